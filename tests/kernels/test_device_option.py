"""``pytest tests/kernels --device``: the suite for the owner of a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from helpers.checkout import CHECKOUT

# as if there were a GPU, of which collecting the tests needs nothing
PRETEND = (
    "import sys, torch; torch.cuda.is_available = lambda: True; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
)


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command, "--device", "cuda", "-q", "-n", "0", "-p", "no:cacheprovider"],
        cwd=CHECKOUT / "tests",
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence():
    done = run("-m", "pytest", "kernels/test_triton.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    said = done.stdout + done.stderr
    assert said.strip() == "ERROR: --device cuda needs a CUDA GPU, and PyTorch finds none; leave it out to use the CPU"


@pytest.mark.slow
def test_a_gpu_runs_the_grid_and_no_test_of_a_cpu():
    done = run("-c", PRETEND, "kernels", "--collect-only")
    names = {line.partition("[")[0] for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line}
    modules = {name.partition("::")[0].rpartition("/")[2] for name in names}
    assert modules == {
        f"test_{name}.py"
        for name in ("float8", "float8_loss", "linear", "metrics", "softmax", "sparse_triton", "triton")
    }, done.stdout[-2000:]
    for name in ("test_triton.py::test_value_and_gradient_from_logits", "test_linear.py::test_grid"):
        assert any(found.endswith(name) for found in names)
    assert not any("waits" in name or "wait_for" in name for name in names)
