"""``softmax_kd_loss`` as a registered operator, which ``torch.compile`` and ``torch.export`` keep in their graphs.

Eager calls go by the autograd Function of ``_softmax.py``; both run the same functions.
"""

import math

import torch
from torch import Tensor

from ._checks import check_label_values
from ._derivatives import anchor, is_traced, on_graph_of, refuse_graph_of_gradients, refuse_transforms
from ._ops import NAMESPACE, fake_results, nothing, pack, shared_ids, unpack
from ._plan import Plan
from ._softmax import softmax_backward, softmax_forward


@torch.library.custom_op(f"{NAMESPACE}::softmax_kd", mutates_args=())
def _softmax_kd(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    divergence: str,
    beta: float | None,
    temperature: float,
    kd_ratio: float,
    ignore_index: int,
    scale: bool,
    metrics: str,
    reduction: str,
    want_grad: bool,
    backend: str,
    inputs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums of the metrics, number of valid tokens, gradient; `inputs` is for autograd, see ``anchor``."""
    vocab = shared_ids(student, teacher, -1)
    if labels is not None:
        check_label_values(labels, vocab, ignore_index)
    settings = (divergence, beta, temperature, kd_ratio, ignore_index, scale, metrics, reduction)
    plan = unpack(vocab, *settings, teacher is not None, want_grad)
    *results, grad = softmax_forward(student, teacher, labels, plan, backend)
    return *results, nothing(student) if grad is None else grad


@_softmax_kd.register_fake
def _(
    student, teacher, labels, divergence, beta, temperature, kd_ratio, ignore_index, scale, metrics, reduction,
    want_grad, backend, inputs,
):  # fmt: skip
    grad = student.new_empty(student.shape) if want_grad else nothing(student)
    # Size.numel() would make N a constant of the graph
    return *fake_results(student, teacher, math.prod(student.shape[:-1]), metrics, reduction), grad


@torch.library.custom_op(f"{NAMESPACE}::softmax_kd_backward", mutates_args=())
def _softmax_kd_backward(
    grad: Tensor, grad_loss: Tensor, count: Tensor, reduction: str, backend: str, compiled: bool
) -> Tensor:
    if compiled:
        refuse_graph_of_gradients()
    return softmax_backward(grad, grad_loss, count, reduction, backend, in_place=False)


@_softmax_kd_backward.register_fake
def _(grad, grad_loss, count, reduction, backend, compiled):
    return torch.empty_like(grad)


def _softmax_context(ctx, inputs, output) -> None:
    *_, ctx.reduction, _, ctx.backend, graph = inputs
    _, metrics, count, grad = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(metrics, count, grad)
    ctx.save_for_backward(grad, count, graph)


def _softmax_gradient(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    refuse_transforms(grad_loss)
    grad, count, graph = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 14
    with torch.no_grad():
        out = _softmax_kd_backward(grad, grad_loss, count, ctx.reduction, ctx.backend, is_traced())
    return *on_graph_of((out,), grad_loss, graph), *(None,) * 13


_softmax_kd.register_autograd(_softmax_gradient, setup_context=_softmax_context)


def softmax_kd_op(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, plan: Plan, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``SoftmaxKD.apply`` for a graph."""
    inputs = anchor(student) if plan.want_grad else None
    return _softmax_kd(student, teacher, labels, *pack(plan), plan.want_grad, backend, inputs)[:3]
