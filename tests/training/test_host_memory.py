"""Memory that is freed stays with the process: another tensor of its size costs no page faults."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from torchtune_kd.training.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(100 * 2**20, dtype=torch.uint8).fill_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.heavy
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_freed_is_used_again():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, given_back = faults("kept"), faults("given back")
    assert kept < 50 <= given_back  # pages of 2 MiB, or of 4 KiB
