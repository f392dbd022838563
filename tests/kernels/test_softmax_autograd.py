"""How softmax_kd_loss behaves as a part of graphs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from helpers.grid_checks import gradient
from torchtune_kd.kernels import softmax_kd_loss

BF16, F32 = torch.bfloat16, torch.float32


def test_gradient_survives_a_second_backward_and_an_incoming_scale(backend):
    student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    loss = softmax_kd_loss(student, teacher)
    first = gradient_of(loss, student, 1.0, retain=True)
    doubled = gradient_of(loss, student, 2.0, retain=True)
    last = gradient_of(loss, student, 1.0, retain=False)
    assert torch.equal(first, last)
    assert torch.equal(doubled, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        gradient_of(loss, student, 1.0, retain=False)


def gradient_of(loss, student, scale, retain):
    return torch.autograd.grad(loss, student, torch.tensor(scale), retain_graph=retain)[0].clone()


class Allocations(TorchDispatchMode):
    """Shapes of the tensors that are made."""

    def __init__(self):
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func._schema.is_mutable and not func.is_view:
            self.shapes.append(tuple(out.shape))
        return out


# N is several blocks of rows.
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("torch_tells", [True, False])
def test_backward_scales_in_place_where_torch_tells_that_the_graph_goes(monkeypatch, torch_tells, dtype, reduction):
    if not torch_tells:
        monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    n, v = 300, 8192
    student, teacher = torch.randn(2, n, v).to(dtype).unbind()
    student.requires_grad_()

    def run(retain):
        loss = softmax_kd_loss(student, teacher, reduction=reduction).sum()
        with Allocations() as allocations:
            (grad,) = torch.autograd.grad(2 * loss, student, retain_graph=retain)
        return grad, (n, v) in allocations.shapes

    gone, second_tensor = run(retain=False)
    kept, another = run(retain=True)
    assert torch.equal(gone, kept)
    assert another
    assert second_tensor is not torch_tells


def test_twice_in_one_graph_and_under_checkpoint(backend):
    student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    once = gradient(softmax_kd_loss(student, teacher), student)[0]
    twice = softmax_kd_loss(student, teacher) + 2 * softmax_kd_loss(student, teacher)
    assert torch.allclose(gradient(twice, student)[0], 3 * once)
    for reentrant in (False, True):
        loss = checkpoint(softmax_kd_loss, student, teacher, use_reentrant=reentrant)
        student.grad = None
        loss.backward()
        assert torch.equal(student.grad, once)


def test_autocast_leaves_the_arithmetic_in_fp32(backend):
    student, teacher = torch.randn(2, 3, 40)
    plain = softmax_kd_loss(student, teacher, divergence="jsd", temperature=3.0)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(softmax_kd_loss(student, teacher, divergence="jsd", temperature=3.0), plain)
