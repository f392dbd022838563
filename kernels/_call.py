"""The second step of the public functions: the loss of tensors by an `Objective` that was built, and checked, before.

A training loop builds its objective once and calls these.

Legend: N tokens, V vocabulary, D hidden width, B batch, S sequence.
"""

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import (
    BACKENDS,
    check_choice,
    check_chunk_tokens,
    check_float8_head,
    check_float8_source,
    check_group,
    check_head,
    check_labels,
    check_rows,
    check_scale,
    check_teacher,
    check_teacher_present,
    resolve_backend,
    shared_vocab,
)
from ._derivatives import check_transforms
from ._ensemble import check_mixed, check_no_shares, check_shares, is_ensemble, members_of
from ._float8 import Float8Weight, quantised_weight
from ._linear import LinearKD
from ._meta import META
from ._objective import Objective, needs_teacher, resolve_metrics
from ._operators import float8_weight_op, linear_kd_op, softmax_kd_op
from ._plan import Plan, autocast_type, to_device
from ._softmax import SoftmaxKD
from ._teachers import (
    HEAD,
    MIXES,
    PROBABILITIES,
    Mixture,
    Teacher,
    TeacherHead,
    heads_of,
    scores_of,
    tensors_of,
)

REDUCTIONS = ("mean", "sum", "none")
HEAD_DTYPES = ("float8",)

Result = Tensor | tuple[Tensor, dict[str, Tensor]]


def softmax_kd_objective(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    objective: Objective,
    *,
    reduction: str = "mean",
    scale: float = 1.0,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
    group: "dist.ProcessGroup | None" = None,
) -> Result:
    """Compute :func:`softmax_kd_loss` of an objective that was built, and so checked, before."""
    check_transforms()
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    check_rows("student_logits", student_logits, "V", labels)
    check_scale(scale)
    if labels is None and objective.kd_ratio != 1.0:
        raise ValueError(
            f"kd_ratio={objective.kd_ratio} includes a cross-entropy, which needs labels; pass them or kd_ratio=1"
        )
    metrics = resolve_metrics(return_metrics, teacher_logits is not None, labels is not None)
    check_teacher_present("teacher_logits", teacher_logits, objective)
    vocab = student_logits.shape[-1]
    has_teacher = needs_teacher(objective.kd_ratio, metrics)
    if not has_teacher:
        teacher_logits = None
    else:
        assert teacher_logits is not None  # resolve_metrics or check_teacher_present would have refused
        check_teacher("teacher_logits", teacher_logits, student_logits)
        vocab = shared_vocab(vocab, teacher_logits.shape[-1])
    flat_labels = None
    if labels is not None:
        known = vocab if group is None else None
        flat_labels = to_device(check_labels(labels, known, objective.ignore_index), student_logits.device)

    want_grad = torch.is_grad_enabled() and student_logits.requires_grad
    plan = Plan(objective, metrics, vocab, reduction, has_teacher, want_grad, float(scale))
    backend = resolve_backend(backend, student_logits, teacher_logits)
    if backend == META:
        raise ValueError("on_meta knows the loss from hidden states alone; call linear_kd_loss inside of it")
    if group is not None:
        loss, sums, count = _sharded(student_logits, teacher_logits, flat_labels, plan, backend, group)
    else:
        apply = softmax_kd_op if torch.compiler.is_compiling() else SoftmaxKD.apply
        loss, sums, count = apply(student_logits, teacher_logits, flat_labels, plan, backend)
    return _result(loss, sums, count, plan, student_logits.shape[:-1], return_metrics)


def linear_kd_objective(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_weight: Tensor | Float8Weight | Sequence[Tensor | Float8Weight] | None,
    labels: Tensor,
    objective: Objective,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    teacher_shares: Sequence[float] | None = None,
    teacher_mix: str = PROBABILITIES,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    teacher_head_dtype: str | None = None,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
) -> Result:
    """Compute :func:`linear_kd_loss` of an objective that was built, and so checked, before."""
    check_transforms()
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    if teacher_head_dtype is not None:
        check_choice("teacher_head_dtype", teacher_head_dtype, HEAD_DTYPES)
    check_choice("teacher_mix", teacher_mix, MIXES)
    check_chunk_tokens(chunk_tokens)
    if labels is None:
        raise ValueError("linear_kd_loss needs labels [N] to know the valid tokens, but got None")
    check_rows("student_hidden", student_hidden, "D", labels)
    teacher_given = teacher_hidden is not None and teacher_weight is not None
    metrics = resolve_metrics(return_metrics, teacher_given, True)
    check_teacher_present("teacher_hidden", teacher_hidden, objective)
    check_teacher_present("teacher_weight", teacher_weight, objective)
    has_teacher = needs_teacher(objective.kd_ratio, metrics)
    student_hidden, student_weight, student_bias = check_head("student", student_hidden, student_weight, student_bias)
    vocab = student_weight.shape[0]
    teacher: Teacher = None
    if has_teacher:
        assert teacher_hidden is not None and teacher_weight is not None  # or it would have been refused above
        factors = teacher_hidden, teacher_weight, teacher_bias
        teacher = _teacher(student_hidden, *factors, teacher_head_dtype, teacher_shares, teacher_mix)
        vocab = min([shared_vocab(vocab, head.vocab) for head in heads_of(teacher)])
    flat_labels = check_labels(labels, vocab, objective.ignore_index)

    student = student_hidden, student_weight, student_bias
    mixture = (teacher.of, teacher.shares) if isinstance(teacher, Mixture) else (HEAD, ())
    plan = Plan(objective, metrics, vocab, reduction, has_teacher, wants_gradient(*student), 1.0, *mixture)
    backend = resolve_backend(backend, student_hidden, *scores_of(teacher))
    return linear_result(student, flat_labels, plan, chunk_tokens, backend, teacher, return_metrics)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a gradient of one of the student's tensors will be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear_result(
    student: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    plan: Plan,
    chunk_tokens: int | None,
    backend: str,
    teacher: Teacher,
    return_metrics: object,
) -> Result:
    """Compute the loss from hidden states of arguments that were checked.

    Args:
        student (tuple[Tensor, Tensor, Tensor | None]): hidden states ``[N, D]`` or ``[B, S, D]``, head and bias.
        labels (Tensor): ``[N]`` int64, flat.
        plan (Plan): what to compute.
        chunk_tokens (int | None): tokens of a chunk; None chooses.
        backend (str): what ``resolve_backend`` returned.
        teacher (Teacher): what it is measured against.
        return_metrics (object): whether to return them.
    """
    if torch.compiler.is_compiling():  # it takes up again here where it left off at the caller's refusal
        check_transforms()
    hidden, weight, bias = student
    rows = hidden.reshape(-1, hidden.shape[-1])
    apply = linear_kd_op if torch.compiler.is_compiling() else LinearKD.apply
    with torch.autocast(autocast_type(hidden.device), enabled=False):
        settings = labels, plan, chunk_tokens, backend
        loss, sums, count = apply(rows, weight, bias, *settings, *tensors_of(teacher))
    return _result(loss, sums, count, plan, hidden.shape[:-1], return_metrics)


def float8_weight(weight: Tensor) -> Float8Weight:
    r"""Quantise a teacher's head for :func:`linear_kd_loss`, once for all calls.

    .. math:: s_v = \max_d |W_{vd}| / 448, \qquad \hat W_{vd} = \mathrm{e4m3}(W_{vd} / s_v)

    so that :math:`W_{vd} \approx s_v \hat W_{vd}`. A row of zeros stays one. The head itself is not needed any more.

    Args:
        weight (Tensor): ``[V, D]``, bf16, fp16, fp32 or fp64, not requiring grad, D a multiple of 16.

    Returns:
        Float8Weight: `data` float8_e4m3fn, V rounded up to a multiple of 64 rows, and `scale` ``[V]`` fp32, on the
        same device.

    Raises:
        ValueError: if it cannot be quantised.
    """
    check_float8_source("weight", weight)
    return float8_weight_op(weight) if torch.compiler.is_compiling() else quantised_weight(weight)


def _teacher(
    student_hidden: Tensor,
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Float8Weight | Sequence[Tensor | Float8Weight],
    bias: Tensor | Sequence[Tensor | None] | None,
    head_dtype: str | None,
    shares: Sequence[float] | None,
    mix: str,
) -> Teacher:
    """Return one teacher, or an ensemble where the tensors come in sequences."""

    def head(hidden: Tensor, weight: Tensor | Float8Weight, bias: Tensor | None) -> TeacherHead:
        check_teacher("teacher_hidden", hidden, student_hidden)
        return _teacher_head(hidden, weight, bias, head_dtype)

    if not is_ensemble(hidden, weight, bias):
        check_no_shares(shares)
        return head(hidden, weight, bias)  # pyright: ignore[reportArgumentType]: none of them is a sequence
    heads = []
    for at, member in enumerate(members_of(hidden, weight, bias)):
        try:
            heads.append(head(*member))
        except ValueError as error:
            raise ValueError(f"member {at} of the ensemble: {error}") from None
    weights = check_shares(shares, len(heads))
    check_mixed(heads, mix)
    return heads[0] if len(heads) == 1 else Mixture(tuple(heads), weights, mix)


def _teacher_head(
    hidden: Tensor, weight: Tensor | Float8Weight, bias: Tensor | None, head_dtype: str | None
) -> TeacherHead:
    """Return the teacher's hidden states ``[N, D]``, head, bias, and scales where the head is in 8-bit floats."""
    if not isinstance(weight, Float8Weight):
        for name, tensor in (("teacher_weight", weight), ("teacher_bias", bias)):
            if tensor is not None:
                check_teacher(name, tensor, None)
        hidden, weight, bias = check_head("teacher", hidden, weight, bias)
        if head_dtype is None:
            return TeacherHead(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
        check_float8_source("teacher_weight", weight)
        weight = float8_weight(weight)
    hidden, (data, scale), bias = check_float8_head(hidden, weight, bias)
    return TeacherHead(hidden.reshape(-1, hidden.shape[-1]), data, bias, scale)


def _sharded(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, plan: Plan, backend: str, group: "dist.ProcessGroup"
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `SoftmaxKD` to shards, outside of graphs."""
    check_group(backend, group, student.shape[-1], None if teacher is None else teacher.shape[-1])
    # torch.compiler.disable imports the compiler, so not for those who do not use it
    apply = torch.compiler.disable(SoftmaxKD.apply) if "torch._dynamo" in sys.modules else SoftmaxKD.apply
    return apply(student, teacher, labels, plan, backend, group)  # pyright: ignore[reportCallIssue]: disable() is untyped


_sharded._torchdynamo_disable = True  # the mark of torch.compiler.disable: graphs end before this function


def _result(loss: Tensor, sums: Tensor, count: Tensor, plan: Plan, shape: torch.Size, return_metrics: object) -> Result:
    """Return what the public functions do."""
    if plan.reduction == "none":
        loss = loss.view(shape)
    if return_metrics is False:
        return loss
    metrics = dict(zip(plan.metrics, sums.unbind(), strict=True))
    metrics["num_tokens"] = count.float()
    return loss, metrics
