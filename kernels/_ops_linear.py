"""``linear_kd_loss`` as a registered operator, which ``torch.compile`` and ``torch.export`` keep in their graphs.

Eager calls go by the autograd Function of ``_linear.py``; both run the same functions.
"""

import torch
from torch import Tensor

from ._checks import check_label_values
from ._derivatives import anchor, is_traced, on_graph_of, refuse_graph_of_gradients, refuse_transforms
from ._linear import (
    Gradients,
    Heads,
    NeededGradients,
    linear_forward,
    one_chunk,
    recomputed_gradients,
    remaining_scale,
    scaled_gradients,
)
from ._ops import NAMESPACE, fake_results, if_wanted, nothing, pack, shared_ids, unpack
from ._plan import Plan, working_dtype
from ._torch.head_gradient import head_gradient_dtype


@torch.library.custom_op(f"{NAMESPACE}::linear_kd", mutates_args=())
def _linear_kd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    divergence: str,
    beta: float | None,
    temperature: float,
    kd_ratio: float,
    ignore_index: int,
    scale: bool,
    metrics: str,
    reduction: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    chunk_tokens: int | None,
    backend: str,
    inputs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums of the metrics, number of valid tokens, `Gradients`; `inputs` is for autograd, see ``anchor``."""
    vocab = shared_ids(weight, teacher_weight, 0)
    check_label_values(labels, vocab, ignore_index)
    needed = NeededGradients(want_hidden, want_weight, want_bias)
    settings = (divergence, beta, temperature, kd_ratio, ignore_index, scale, metrics, reduction)
    plan = unpack(vocab, *settings, teacher_weight is not None, any(needed))
    if needed.wait_for_backward(reduction):
        needed = NeededGradients(False, False, False)
    heads = Heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    *results, grads = linear_forward(heads, labels, plan, chunk_tokens, backend, needed)
    return *results, *(nothing(hidden) if grad is None else grad for grad in grads)


@_linear_kd.register_fake
def _(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, divergence, beta, temperature, kd_ratio,
    ignore_index, scale, metrics, reduction, want_hidden, want_weight, want_bias, chunk_tokens, backend, inputs,
):  # fmt: skip
    needed = NeededGradients(want_hidden, want_weight, want_bias)
    if needed.wait_for_backward(reduction):
        needed = NeededGradients(False, False, False)
    heads = Heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    results = fake_results(hidden, teacher_hidden, hidden.shape[0], metrics, reduction)
    return *results, *_fake_gradients(heads, chunk_tokens, needed)


def _fake_gradients(heads: Heads, chunk_tokens: int | None, needed: NeededGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `Gradients`."""
    hidden, weight = heads.hidden, heads.weight
    head_dtype = weight.dtype
    if needed.weight:
        vocab = shared_ids(weight, heads.teacher_weight, 0)
        head_dtype = head_gradient_dtype(weight.dtype, one_chunk(heads, vocab, chunk_tokens))
    return (
        torch.empty_like(hidden) if needed.hidden else nothing(hidden),
        torch.empty_like(weight, dtype=head_dtype) if needed.weight else nothing(hidden),
        weight.new_empty(weight.shape[0], dtype=working_dtype(hidden, heads.teacher_hidden))
        if needed.bias
        else nothing(hidden),
    )


@torch.library.custom_op(f"{NAMESPACE}::linear_kd_backward", mutates_args=())
def _linear_kd_backward(
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_loss: Tensor,
    count: Tensor,
    reduction: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    backend: str,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if compiled:
        refuse_graph_of_gradients()
    needed = (want_hidden, want_weight, want_bias)
    grads = Gradients(*map(if_wanted, (grad_hidden, grad_weight, grad_bias), needed))
    scale = remaining_scale(grad_loss, count, reduction, backend, hidden_dtype)
    out = scaled_gradients(grads, scale, hidden_dtype, weight_dtype)
    return tuple(nothing(grad_hidden) if grad is None else grad for grad in out)


@_linear_kd_backward.register_fake
def _(
    grad_hidden, grad_weight, grad_bias, grad_loss, count, reduction, want_hidden, want_weight, want_bias,
    hidden_dtype, weight_dtype, backend, compiled,
):  # fmt: skip
    needed = (want_hidden, want_weight, want_bias)
    grads = (grad_hidden, grad_weight, grad_bias)
    dtypes = (hidden_dtype, weight_dtype, weight_dtype)
    return tuple(
        torch.empty_like(grad, dtype=dtype) if wanted else nothing(grad_hidden)
        for grad, dtype, wanted in zip(grads, dtypes, needed, strict=True)
    )


@torch.library.custom_op(f"{NAMESPACE}::linear_kd_recomputed", mutates_args=())
def _linear_kd_recomputed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    grad_loss: Tensor,
    divergence: str,
    beta: float | None,
    temperature: float,
    kd_ratio: float,
    ignore_index: int,
    scale: bool,
    metrics: str,
    reduction: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    chunk_tokens: int | None,
    backend: str,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ grad_loss·loss: the chunks are walked again."""
    if compiled:
        refuse_graph_of_gradients()
    heads = Heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    settings = (divergence, beta, temperature, kd_ratio, ignore_index, scale, metrics, reduction)
    plan = unpack(shared_ids(weight, teacher_weight, 0), *settings, teacher_weight is not None, True)
    needed = NeededGradients(want_hidden, want_weight, want_bias)
    grads = recomputed_gradients(heads, labels, plan, chunk_tokens, backend, needed, grad_loss.unsqueeze(-1))
    out = scaled_gradients(grads, grad_loss.new_ones(()), hidden.dtype, weight.dtype)
    return tuple(nothing(hidden) if grad is None else grad for grad in out)


@_linear_kd_recomputed.register_fake
def _(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, grad_loss, divergence, beta,
    temperature, kd_ratio, ignore_index, scale, metrics, reduction, want_hidden, want_weight, want_bias, chunk_tokens,
    backend, compiled,
):  # fmt: skip
    return (
        torch.empty_like(hidden) if want_hidden else nothing(hidden),
        torch.empty_like(weight) if want_weight else nothing(hidden),
        weight.new_empty(weight.shape[0]) if want_bias else nothing(hidden),
    )


def _linear_context(ctx, inputs, output) -> None:
    heads, labels, settings = Heads(*inputs[:6]), inputs[6], inputs[7:15]
    *needed, ctx.chunk_tokens, ctx.backend, graph = inputs[15:]
    ctx.needed, ctx.settings, ctx.reduction = NeededGradients(*needed), settings, settings[-1]
    ctx.recomputes = ctx.needed.wait_for_backward(ctx.reduction)
    ctx.dtypes = heads.hidden.dtype, heads.weight.dtype
    _, metrics, count, *grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(metrics, count, *grads)
    ctx.save_for_backward(graph, *((*heads, labels) if ctx.recomputes else (*grads, count)))


def _linear_gradient(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    refuse_transforms(grad_loss)
    nothing = (None,) * 18
    if grad_loss is None:
        return None, None, None, *nothing
    needed, graph = ctx.needed, ctx.saved_tensors[0]
    with torch.no_grad():
        if ctx.recomputes:
            _, *heads, labels = ctx.saved_tensors
            last = (*needed, ctx.chunk_tokens, ctx.backend, is_traced())
            grads = _linear_kd_recomputed(*heads, labels, grad_loss, *ctx.settings, *last)
        else:
            _, *grads, count = ctx.saved_tensors
            last = (*needed, *ctx.dtypes, ctx.backend, is_traced())
            grads = _linear_kd_backward(*grads, grad_loss, count, ctx.reduction, *last)
    return *on_graph_of(tuple(map(if_wanted, grads, needed)), grad_loss, graph), *nothing


_linear_kd.register_autograd(_linear_gradient, setup_context=_linear_context)


def linear_kd_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    plan: Plan,
    chunk_tokens: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``LinearKD.apply`` for a graph."""
    tensors = (hidden, weight, bias)
    needed = (plan.want_grad and tensor is not None and tensor.requires_grad for tensor in tensors)
    heads = (*tensors, teacher_hidden, teacher_weight, teacher_bias)
    inputs = anchor(*tensors) if plan.want_grad else None
    return _linear_kd(*heads, labels, *pack(plan), *needed, chunk_tokens, backend, inputs)[:3]
