"""Both functions as registered operators, which ``torch.compile`` and ``torch.export`` keep in their graphs.

Eager calls go by the autograd Functions of ``_softmax.py`` and ``_linear.py``; either way the same functions run.
Operators take plain values, so that each is handed its plan, and the gradients it needs, as a line of text.

Legend: N tokens, M metrics, V vocabulary, D hidden width.
"""

import math
from typing import Sequence  # noqa: UP035 PyTorch 2.6 knows no other in an operator's signature

import torch
from torch import Tensor

from ._checks import check_label_values
from ._chunks import Models, one_chunk
from ._derivatives import anchor, is_traced, on_graph_of, refuse_graph_of_gradients, refuse_transforms
from ._float8 import FLOAT8, Float8Weight, padded, quantised_weight
from ._linear import Gradients, NeededGradients, linear_forward, recomputed_gradients, scaled_gradients
from ._packing import pack, pack_needed, pack_optional, unpack, unpack_needed, unpack_optional
from ._plan import Plan, working_dtype
from ._scaling import remaining_scale
from ._softmax import softmax_backward, softmax_forward
from ._teachers import scored_ids, scores_of, teacher_of
from ._torch.head_gradient import head_gradient_dtype

# a copy of this folder under another name registers operators of its own
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")


def nothing(like: Tensor) -> Tensor:
    """Return what stands for a gradient that is not needed, because operators return tensors only."""
    return like.new_empty(0)


def tensors_of(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of hidden states, head and bias, with :func:`nothing` for those that are not needed."""
    hidden, weight, bias = grads
    return (
        nothing(like) if hidden is None else hidden,
        nothing(like) if weight is None else weight,
        nothing(like) if bias is None else bias,
    )


def if_needed(tensor: Tensor, needed: bool) -> Tensor | None:
    """Return a gradient, or None for what stands for one."""
    return tensor if needed else None


def shared_ids(student: Tensor, teacher: Tensor | None) -> int:
    """Return the number of ids that both models' logits have."""
    return student.shape[-1] if teacher is None else min(student.shape[-1], teacher.shape[-1])


def models_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Sequence[Tensor], given: str, plan: Plan
) -> Models:
    """Return both models of an operator's tensors."""
    return Models(hidden, weight, bias, teacher_of(plan.teacher_kind, plan.shares, unpack_optional(teacher, given)))


def with_vocab(plan: Plan, models: Models) -> Plan:
    """Fill in the vocabulary, which the tensors tell."""
    return plan._replace(vocab=scored_ids(models.weight.shape[0], models.teacher))


def fake_results(
    student: Tensor, scores: Sequence[Tensor | None], n_tokens: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, sums of the metrics ``[M]`` and number of tokens without their values; `scores` of the teacher."""
    shape = (n_tokens,) if plan.reduction == "none" else ()
    return (
        student.new_empty(shape, dtype=working_dtype(student, *scores)),
        student.new_empty(len(plan.metrics), dtype=torch.float32),
        student.new_empty((), dtype=torch.int64),
    )


# --------------------------------------------------------------------------------------------------- from logits


@torch.library.custom_op(f"{NAMESPACE}::softmax_kd", mutates_args=())
def _softmax_kd(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, plan: str, backend: str, inputs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, sums of the metrics, number of valid tokens, gradient; `inputs` is for autograd, see ``anchor``."""
    settings = unpack(plan)._replace(vocab=shared_ids(student, teacher))
    if labels is not None:
        check_label_values(labels, settings.vocab, settings.objective.ignore_index)
    loss, sums, count, grad = softmax_forward(student, teacher, labels, settings, backend)
    return loss, sums, count, nothing(student) if grad is None else grad


@_softmax_kd.register_fake
def _(student, teacher, labels, plan, backend, inputs):
    settings = unpack(plan)
    grad = student.new_empty(student.shape) if settings.want_grad else nothing(student)
    # Size.numel() would make N a constant of the graph
    return *fake_results(student, (teacher,), math.prod(student.shape[:-1]), settings), grad


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
    *_, plan, ctx.backend, graph = inputs
    _, metrics, count, grad = output
    ctx.reduction = unpack(plan).reduction
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(metrics, count, grad)
    ctx.save_for_backward(grad, count, graph)


def _softmax_gradient(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    refuse_transforms(grad_loss)
    grad, count, graph = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 6
    with torch.no_grad():
        out = _softmax_kd_backward(grad, grad_loss, count, ctx.reduction, ctx.backend, is_traced())
    return *on_graph_of((out,), grad_loss, graph), *(None,) * 5


_softmax_kd.register_autograd(_softmax_gradient, setup_context=_softmax_context)


def softmax_kd_op(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, plan: Plan, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Do in a graph what ``SoftmaxKD.apply`` does eagerly."""
    inputs = anchor(student) if plan.want_grad else None
    return _softmax_kd(student, teacher, labels, pack(plan), backend, inputs)[:3]


# --------------------------------------------------------------------------------------------- from hidden states


@torch.library.custom_op(f"{NAMESPACE}::float8_weight", mutates_args=())
def _float8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return data and scale of ``Float8Weight``."""
    data, scale = quantised_weight(weight)
    return data, scale


@_float8_weight.register_fake
def _(weight):
    vocab, width = weight.shape
    return weight.new_empty(padded(vocab), width, dtype=FLOAT8), weight.new_empty(vocab, dtype=torch.float32)


def float8_weight_op(weight: Tensor) -> Float8Weight:
    """Do in a graph what ``quantised_weight`` does eagerly."""
    return Float8Weight(*_float8_weight(weight))


@torch.library.custom_op(f"{NAMESPACE}::linear_kd", mutates_args=())
def _linear_kd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Sequence[Tensor],
    given: str,
    labels: Tensor,
    plan: str,
    needed: str,
    chunk_tokens: int | None,
    backend: str,
    inputs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, sums of the metrics, number of valid tokens, `Gradients`; `inputs` as for ``softmax_kd``."""
    models = models_of(hidden, weight, bias, teacher, given, unpack(plan))
    settings = with_vocab(unpack(plan), models)
    check_label_values(labels, settings.vocab, settings.objective.ignore_index)
    now = unpack_needed(needed).before_backward(settings.reduction)
    loss, sums, count, grads = linear_forward(models, labels, settings, chunk_tokens, backend, now)
    return loss, sums, count, *tensors_of(grads, hidden)


@_linear_kd.register_fake
def _(hidden, weight, bias, teacher, given, labels, plan, needed, chunk_tokens, backend, inputs):
    settings = unpack(plan)
    models = models_of(hidden, weight, bias, teacher, given, settings)
    now = unpack_needed(needed).before_backward(settings.reduction)
    results = fake_results(hidden, scores_of(models.teacher), hidden.shape[0], settings)
    return *results, *_fake_gradients(models, chunk_tokens, now)


def _fake_gradients(models: Models, chunk_tokens: int | None, needed: NeededGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Return `Gradients` without their values."""
    hidden, weight = models.hidden, models.weight
    of_hidden, of_weight, of_bias = (nothing(hidden) for _ in range(3))  # no two outputs are one tensor
    if needed.hidden:
        of_hidden = torch.empty_like(hidden)
    if needed.weight:
        single = one_chunk(models, scored_ids(weight.shape[0], models.teacher), chunk_tokens)
        of_weight = torch.empty_like(weight, dtype=head_gradient_dtype(weight.dtype, single))
    if needed.bias:
        of_bias = weight.new_empty(weight.shape[0], dtype=working_dtype(hidden, *scores_of(models.teacher)))
    return of_hidden, of_weight, of_bias


@torch.library.custom_op(f"{NAMESPACE}::linear_kd_backward", mutates_args=())
def _linear_kd_backward(
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_loss: Tensor,
    count: Tensor,
    reduction: str,
    needed: str,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    backend: str,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if compiled:
        refuse_graph_of_gradients()
    grads = Gradients(*map(if_needed, (grad_hidden, grad_weight, grad_bias), unpack_needed(needed)))
    scale = remaining_scale(grad_loss, count, reduction, backend, hidden_dtype)
    return tensors_of(scaled_gradients(grads, scale, hidden_dtype, weight_dtype), grad_hidden)


@_linear_kd_backward.register_fake
def _(
    grad_hidden, grad_weight, grad_bias, grad_loss, count, reduction, needed, hidden_dtype, weight_dtype, backend,
    compiled,
):  # fmt: skip
    grads = (grad_hidden, grad_weight, grad_bias)
    dtypes = (hidden_dtype, weight_dtype, weight_dtype)
    return tuple(
        torch.empty_like(grad, dtype=dtype) if is_needed else nothing(grad_hidden)
        for grad, dtype, is_needed in zip(grads, dtypes, unpack_needed(needed), strict=True)
    )


@torch.library.custom_op(f"{NAMESPACE}::linear_kd_recomputed", mutates_args=())
def _linear_kd_recomputed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Sequence[Tensor],
    given: str,
    labels: Tensor,
    grad_loss: Tensor,
    plan: str,
    needed: str,
    chunk_tokens: int | None,
    backend: str,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of Σ grad_loss·loss, by walking the chunks again."""
    if compiled:
        refuse_graph_of_gradients()
    models = models_of(hidden, weight, bias, teacher, given, unpack(plan))
    settings = with_vocab(unpack(plan), models)
    rows = grad_loss.unsqueeze(-1)
    grads = recomputed_gradients(models, labels, settings, chunk_tokens, backend, unpack_needed(needed), rows)
    return tensors_of(scaled_gradients(grads, grad_loss.new_ones(()), hidden.dtype, weight.dtype), hidden)


@_linear_kd_recomputed.register_fake
def _(hidden, weight, bias, teacher, given, labels, grad_loss, plan, needed, chunk_tokens, backend, compiled):
    of_hidden, of_weight, of_bias = unpack_needed(needed)
    return (
        torch.empty_like(hidden) if of_hidden else nothing(hidden),
        torch.empty_like(weight) if of_weight else nothing(hidden),
        weight.new_empty(weight.shape[0]) if of_bias else nothing(hidden),
    )


def _linear_context(ctx, inputs, output) -> None:
    *student, teacher, ctx.given, labels = inputs[:6]
    ctx.plan, ctx.needed, ctx.chunk_tokens, ctx.backend, graph = inputs[6:]
    ctx.reduction = unpack(ctx.plan).reduction
    ctx.recomputes = unpack_needed(ctx.needed).wait_for_backward(ctx.reduction)
    ctx.dtypes = student[0].dtype, student[1].dtype
    _, metrics, count, *grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(metrics, count, *grads)
    ctx.save_for_backward(graph, *((*student, labels, *teacher) if ctx.recomputes else (*grads, count)))


def _linear_gradient(ctx, grad_loss: Tensor | None, *_):
    refuse_transforms(grad_loss)
    of_teacher = [None] * ctx.given.count("+")
    if grad_loss is None:
        return None, None, None, of_teacher, *(None,) * 7
    with torch.no_grad():
        if ctx.recomputes:
            graph, hidden, weight, bias, labels, *teacher = ctx.saved_tensors
            settings = (ctx.plan, ctx.needed, ctx.chunk_tokens, ctx.backend, is_traced())
            grads = _linear_kd_recomputed(hidden, weight, bias, teacher, ctx.given, labels, grad_loss, *settings)
        else:
            graph, *stored, count = ctx.saved_tensors
            settings = (ctx.reduction, ctx.needed, *ctx.dtypes, ctx.backend, is_traced())
            grads = _linear_kd_backward(*stored, grad_loss, count, *settings)
    given = tuple(map(if_needed, grads, unpack_needed(ctx.needed)))
    return *on_graph_of(given, grad_loss, graph), of_teacher, *(None,) * 7


_linear_kd.register_autograd(_linear_gradient, setup_context=_linear_context)


def linear_kd_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    plan: Plan,
    chunk_tokens: int | None,
    backend: str,
    *teacher: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do in a graph what ``LinearKD.apply`` does eagerly."""
    trained = (hidden, weight, bias)
    needed = NeededGradients(*[plan.want_grad and t is not None and t.requires_grad for t in trained])
    inputs = anchor(*trained) if plan.want_grad else None
    settings = pack(plan), pack_needed(needed), chunk_tokens, backend
    return _linear_kd(*trained, *pack_optional(teacher), labels, *settings, inputs)[:3]
