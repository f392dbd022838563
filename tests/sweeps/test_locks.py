"""Lock runs, also against killed sweeps and their programs."""

import os
import signal
import subprocess
import sys

import pytest

from torchtune_kd.sweeps.locks import try_lock

HOLD = """
import os, subprocess, sys
from torchtune_kd.sweeps.locks import try_lock
with try_lock(__import__("pathlib").Path(sys.argv[1])) as held:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=sys.stdin, pass_fds=[held])
    print(child.pid, flush=True)
    child.wait()
"""


def test_one_at_a_time(tmp_path):
    with try_lock(tmp_path / "a" / ".lock") as one:
        assert one is not None
        with try_lock(tmp_path / "a" / ".lock") as other:
            assert other is None
    with try_lock(tmp_path / "a" / ".lock") as again:
        assert again is not None


@pytest.mark.heavy
def test_the_program_of_a_killed_process_keeps_the_lock(tmp_path):
    lock = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with try_lock(lock) as held:
        assert held is None  # the program still writes into the folder
    os.kill(child, signal.SIGKILL)
    for _ in range(1000):
        with try_lock(lock) as held:
            if held is not None:
                return
    raise AssertionError("the lock outlived everyone who held it")
