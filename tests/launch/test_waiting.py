"""Whatever we start that computes lets OpenMP's threads sleep while they wait, unless the user says otherwise."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import torchtune_kd

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = Path(torchtune_kd.__file__).parent / "launch"
NAME = "OMP_WAIT_POLICY"
UNSET = {name: value for name, value in os.environ.items() if name != NAME}
USERS = pytest.mark.parametrize("given, policy", [({}, "PASSIVE"), ({NAME: "ACTIVE"}, "ACTIVE")])


def output(command, given, cwd=ROOT):
    done = subprocess.run(command, cwd=cwd, env=UNSET | given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.heavy
@USERS
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make(given, policy):
    assert output(["make", "--no-print-directory", "--eval", f"shown: ; @echo $${NAME}", "shown"], given) == [policy]


@pytest.mark.heavy
@USERS
def test_demo_started_by_hand(given, policy):
    """It is set before PyTorch is loaded, which reads it then; `--steps 0` ends the demo before it loads it."""
    code = (
        "import os, runpy, sys\n"
        "sys.argv = ['demo', '--steps', '0']\n"
        "try:\n    runpy.run_module('torchtune_kd.demo', run_name='__main__')\n"
        f"except SystemExit:\n    print(os.environ['{NAME}'], 'torch' in sys.modules)\n"
    )
    assert output([sys.executable, "-c", code], given) == [policy, "False"]


@pytest.mark.heavy
@USERS
def test_benchmarks(given, policy):
    code = f"import os, sys, benchmarks; print(os.environ['{NAME}'], 'torch' in sys.modules)"
    assert output([sys.executable, "-c", code], given) == [policy, "False"]


@pytest.mark.heavy
@USERS
def test_slurm_script(given, policy):
    exports = re.findall(rf"^export {NAME}=.*$", (LAUNCH / "kd_multinode.slurm").read_text(), re.MULTILINE)
    assert output(["bash", "-c", "\n".join([*exports, f"echo ${NAME}"])], given) == [policy]


def test_kubernetes_manifest():
    manifest = yaml.safe_load((LAUNCH / "kd_pytorchjob.yaml").read_text())
    for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert {"name": NAME, "value": "PASSIVE"} in container["env"]


def test_the_tests_and_what_they_start():
    assert os.environ[NAME]
    assert output([sys.executable, "-c", f"import os; print(os.environ['{NAME}'])"], os.environ) == [os.environ[NAME]]
