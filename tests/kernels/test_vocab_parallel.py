"""``softmax_kd_loss(..., group=)`` by real processes, with shards of unequal size, against the whole vocabulary."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchtune_kd.kernels import softmax_kd_loss

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["30,7", "9,1,20"])
def test_shards_equal_the_whole(tmp_path, sizes):
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", WORKER, tmp_path, sizes]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("rank_*"))) == sizes.count(",") + 1


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_compiled_function_goes_on_around_it(alone):
    def scaled(student, teacher):
        return 2 * softmax_kd_loss(1.5 * student, teacher, temperature=2.0, backend="triton", group=alone)

    student, teacher = torch.randn(2, 20, requires_grad=True), torch.randn(2, 20)
    expected = torch.autograd.grad(scaled(student, teacher), student)
    got = torch.autograd.grad(torch.compile(scaled, backend="aot_eager")(student, teacher), student)
    assert torch.equal(*expected, *got)


def test_no_token_and_no_gradient(alone):
    for n in (0, 2):
        student, teacher = torch.randn(2, n, 20)
        loss = softmax_kd_loss(student, teacher, backend="triton", group=alone)
        assert torch.allclose(loss, softmax_kd_loss(student, teacher, backend="torch"), atol=1e-6)


def test_something_else_than_a_group_is_refused():
    with pytest.raises(ValueError, match=r"group must be a torch\.distributed\.ProcessGroup or None, but got str"):
        softmax_kd_loss(torch.randn(2, 5), torch.randn(2, 5), backend="triton", group="world")
