"""Workspaces that calls on the CPU hand on, and gradients that ``backward()`` hands out as they are."""

import threading

import pytest
import torch
from torch.nn.functional import kl_div

from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss
from torchtune_kd.kernels._torch.workspaces import WORKSPACES

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def kl(student, teacher):
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


@pytest.fixture(autouse=True)
def nothing_kept():
    WORKSPACES.spare.clear()
    yield
    WORKSPACES.spare.clear()


def test_the_next_call_takes_what_the_last_one_left():
    student, teacher = torch.randn(2, 6, 50)
    softmax_kd_loss(student, teacher)
    (kept,) = WORKSPACES.spare
    kept.fill_(torch.nan)
    pointer = kept.data_ptr()
    assert torch.allclose(softmax_kd_loss(student[:2], teacher[:2]), kl(student[:2], teacher[:2]))  # a smaller one
    assert [memory.data_ptr() for memory in WORKSPACES.spare] == [pointer]
    larger = torch.randn(2, 60, 50)
    assert torch.allclose(softmax_kd_loss(*larger), kl(*larger))
    assert [memory.numel() for memory in WORKSPACES.spare] == [10 * kept.numel()]


def test_a_large_workspace_is_not_kept(monkeypatch):
    monkeypatch.setattr(WORKSPACES, "largest", 4 * 6 * 6 * 50 - 1)
    softmax_kd_loss(*torch.randn(2, 6, 50))
    assert not WORKSPACES.spare


def test_none_is_kept_of_a_call_from_hidden_states():
    linear_kd_loss(*(torch.randn(*shape) for shape in ((6, 8), (40, 8), (6, 4), (40, 4))), torch.arange(6))
    assert not WORKSPACES.spare


def test_inference_and_training_take_turns():
    student, teacher = torch.randn(4, 30, requires_grad=True), torch.randn(4, 30)
    for _ in range(2):
        with torch.inference_mode():
            inferred = softmax_kd_loss(student, teacher)
        loss = softmax_kd_loss(student, teacher)
        (grad,) = torch.autograd.grad(loss, student)
        assert torch.allclose(inferred, loss) and grad.isfinite().all()


def test_threads_do_not_share_one():
    inputs = [torch.randn(2, 200, 300) for _ in range(4)]
    losses = [[] for _ in inputs]

    def compute(index):
        for _ in range(20):
            losses[index].append(softmax_kd_loss(*inputs[index]).item())

    threads = [threading.Thread(target=compute, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given, found in zip(inputs, losses, strict=True):
        assert found == pytest.approx([kl(*given).item()] * 20, rel=1e-5)
    assert len(WORKSPACES.spare) <= 2


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_graph_that_is_kept_gives_its_gradients_again(reduction, dtype):
    """Check that backward hands out memory of its own: sums into ``.grad`` do not reach what the graph has stored."""
    student = torch.randn(5, 40).to(dtype).requires_grad_()
    loss = softmax_kd_loss(student, torch.randn(5, 40).to(dtype), reduction=reduction)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(student.grad, 2 * once)
    student.grad = None
    (2 * loss).backward()
    # in fp16 the stored sums are rounded after the product
    assert torch.equal(student.grad, 2 * once) or (dtype == F16 and torch.allclose(student.grad, 2 * once, rtol=1e-3))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_so_does_one_from_hidden_states(dtype):
    heads = [torch.randn(*shape).to(dtype) for shape in ((6, 8), (40, 8), (6, 4), (40, 4))]
    trained = [tensor.requires_grad_() for tensor in heads[:2]]
    loss = linear_kd_loss(*heads, torch.tensor([3, -100, 1, 0, 39, 7]), chunk_tokens=2)
    loss.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in trained]
    loss.backward(retain_graph=True)
    assert all(torch.equal(tensor.grad, 2 * first) for tensor, first in zip(trained, once, strict=True))
    for tensor in trained:
        tensor.grad = None
    loss.backward()
    assert all(torch.equal(tensor.grad, first) for tensor, first in zip(trained, once, strict=True))
