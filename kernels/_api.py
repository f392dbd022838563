"""The public functions, each in two steps: settings become an `Objective`, and the tensors' loss is that of one.

A training loop builds its objective once and calls the second step.

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
from ._float8 import Float8Weight, quantised_weight
from ._linear import LinearKD
from ._meta import META
from ._objective import Objective, needs_teacher, resolve_metrics
from ._operators import float8_weight_op, linear_kd_op, softmax_kd_op
from ._plan import Plan, autocast_type, to_device
from ._softmax import SoftmaxKD

REDUCTIONS = ("mean", "sum", "none")
HEAD_DTYPES = ("float8",)

Result = Tensor | tuple[Tensor, dict[str, Tensor]]


def softmax_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = True,
    scale: float = 1.0,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
    group: "dist.ProcessGroup | None" = None,
) -> Result:
    r"""Compute the distillation loss of given logits.

    For the valid tokens (label other than `ignore_index`) with student logits :math:`z_s`, teacher logits
    :math:`z_t`, :math:`q_T = \mathrm{softmax}(z_s/T)`, :math:`p_T = \mathrm{softmax}(z_t/T)` and α =
    `kd_ratio`:

    .. math:: (1-\alpha)\,\mathrm{CE}(y, q_1) + \alpha\,T^2\,D(p_T, q_T)

    ===================  ============================================  ====  ===============
    divergence           D(p, q)                                       beta  source
    ===================  ============================================  ====  ===============
    ``forward_kl``       Σ p log(p/q)                                  none  Hinton, 2015
    ``reverse_kl``       Σ q log(q/p)                                  none  MiniLLM, 2024
    ``symmetric_kl``     β·KL(p‖q) + (1-β)·KL(q‖p)                     0.5   torchtune
    ``jsd``              β·KL(p‖m) + (1-β)·KL(q‖m), m = βp + (1-β)q;   0.5   GKD, 2024
                         β = 0 means ``forward_kl``, 1 ``reverse_kl``
    ``skew_forward_kl``  KL(p ‖ βp + (1-β)q)                           0.1   DistiLLM, 2024
    ``skew_reverse_kl``  KL(q ‖ (1-β)p + βq)                           0.1   DistiLLM, 2024
    ``tvd``              ½ Σ \|p - q\|                                 none  f-distill, 2023
    ===================  ============================================  ====  ===============

    All are true divergences: never negative, 0 when the student equals the teacher. Arithmetic is fp32, or
    fp64 where an input is fp64. The gradient, to the student alone, is computed together with the loss; to
    differentiate it again is an error, and so are forward mode and the transforms of ``torch.func``. Without a
    valid token the loss is 0 and so is the gradient. An id at -inf in both models contributes nothing; where D
    is +inf the value is +inf and the gradient stays finite.
    Gradients of logits are rounded to the student's dtype before the incoming gradient multiplies them: in
    fp16 those below 6e-8 are 0, whatever the loss is scaled by; train in bf16 or fp32.
    Vocabularies that differ by less than 1024 ids are cut to the shared prefix. Inside ``torch.compile`` the
    call is one operator of the graph.

    Args:
        student_logits (Tensor): ``[N, V]`` or ``[B, S, V]``, bf16, fp16, fp32 or fp64, any strides.
        teacher_logits (Tensor | None): the same leading shape, any of these dtypes, not requiring grad. Not
            touched, and may be None, if `kd_ratio` is 0 and no metric asks for it.
        labels (Tensor | None): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`. None makes every
            token valid and needs `kd_ratio` 1. Values are checked on the CPU only (elsewhere that would wait
            for the device).
        divergence (str): D, one of :data:`DIVERGENCES`.
        beta (float | None): in [0, 1]; None takes the default of the table.
        temperature (float): T in [0.001, 1000].
        kd_ratio (float): α in [0, 1]. At 1 no cross-entropy is computed.
        ignore_index (int): label of tokens that do not count.
        reduction (str): "mean" over valid tokens, "sum", or "none" (the labels' shape, 0 at ignored tokens).
        scale_by_temperature_squared (bool): multiply D by T², which keeps gradients comparable across T.
        scale (float): multiplies loss and gradient, not the metrics. A division by accumulation steps costs nothing
            here; as ``loss / steps`` it takes ``backward()`` a pass over the stored gradient ``[N, V]``.
        backend (str): "torch", "triton" (on CUDA tensors, or where TRITON_INTERPRET=1 interprets it) or "auto":
            Triton for CUDA tensors where it is installed and none is fp64, torch otherwise.
        return_metrics (bool | Sequence[str]): True for all of :data:`METRICS` that the inputs define, or the
            names of some.
        group (dist.ProcessGroup | None): vocabulary-parallel: each process of the group holds a shard of the ids of
            both models, in the order of ranks and cut at the same ids (shards may differ in size, and in the last
            one either model may have padding). `labels` are ids of the whole vocabulary and the same on all
            processes; so are the loss and the metrics, while each gets the gradient of its own shard. Triton only.

    Returns:
        Tensor | tuple[Tensor, dict[str, Tensor]]: the loss in fp32 (fp64), and with `return_metrics` a dict
        of detached fp32 0-d tensors: sums over the valid tokens, so that microbatches and ranks add up, and
        ``num_tokens`` to divide by.

    Raises:
        ValueError: on unknown or unusable arguments.
    """
    return softmax_kd_objective(
        student_logits,
        teacher_logits,
        labels,
        Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale_by_temperature_squared),
        reduction=reduction,
        scale=scale,
        backend=backend,
        return_metrics=return_metrics,
        group=group,
    )


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


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | Float8Weight | None,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = True,
    chunk_tokens: int | None = None,
    teacher_head_dtype: str | None = None,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
) -> Result:
    r"""Compute the distillation loss of ``hidden @ weight.T`` without ever holding ``[N, V]``.

    Ignored tokens are dropped before the matrix products. The rest is worked through in chunks: at most one
    chunk of logits of each model exists at a time, and the student's is overwritten by its gradient.
    Gradients are computed for those of `student_hidden`, `student_weight` and `student_bias` that require
    one (none for a frozen head, none at all under ``no_grad``); a head's is accumulated over chunks in fp32,
    from products that are rounded to the head's dtype.
    Logits are rounded to the models' dtype, as a linear layer's are; the loss arithmetic and its limits are
    those of :func:`softmax_kd_loss`. Under autocast the products run in autocast's dtype, except fp64 ones.

    Args:
        student_hidden (Tensor): last hidden states ``[N, D]`` or ``[B, S, D]``, bf16, fp16, fp32 or fp64.
        student_weight (Tensor): output projection ``[V, D]``, of the same dtype.
        teacher_hidden (Tensor | None): the same leading shape, a width of its own. Not touched, and may be
            None, if `kd_ratio` is 0 and no metric asks for it; so may `teacher_weight`.
        teacher_weight (Tensor | Float8Weight | None): ``[V, D]`` of the teacher, or what :func:`float8_weight` made of
            it.
        labels (Tensor): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`. May stay on the CPU
            while the rest is on a device: then ignored tokens are dropped without waiting for it. With labels on
            the device the host waits once, for the number of valid tokens. A CUDA graph captures labels on the
            device only, and with them the products of all tokens.
        student_bias (Tensor | None): ``[V]`` floating; used, like the next, in the dtype of the products.
        teacher_bias (Tensor | None): ``[V]`` of the teacher.
        divergence (str): see :func:`softmax_kd_loss`, as for all arguments down to
            `scale_by_temperature_squared`.
        beta (float | None): parameter of the divergence.
        temperature (float): T in [0.001, 1000].
        kd_ratio (float): α in [0, 1].
        ignore_index (int): label of tokens that do not count.
        reduction (str): "mean", "sum" or "none". "none" with a trainable head computes its products twice.
        scale_by_temperature_squared (bool): multiply D by T².
        chunk_tokens (int | None): tokens per chunk; None chooses them so that both chunks of logits take at
            most 256 MiB on a CPU and 1 GiB elsewhere (and at least 128 tokens). PyTorch's loss arithmetic needs
            another 14 MiB on a CPU and 224 MiB elsewhere, Triton's nothing.
        teacher_head_dtype (str | None): "float8" computes the teacher's logits from hidden states and head in
            float8_e4m3fn, each row with a scale of its own, summed in fp32; the teacher's D must be a multiple of 16.
            It quantises `teacher_weight` in every call, unless that is a ``Float8Weight``, which needs no
            `teacher_head_dtype`. On NVIDIA's GPUs of compute capability 8.9 and later the product of a bf16 teacher
            takes about 0.6 times as long; anywhere else it is emulated, and slower. README.md has the error.
        backend (str): see :func:`softmax_kd_loss`; of the loss arithmetic, the products are PyTorch's.
        return_metrics (bool | Sequence[str]): see :func:`softmax_kd_loss`.

    Returns:
        Tensor | tuple[Tensor, dict[str, Tensor]]: as :func:`softmax_kd_loss`.

    Raises:
        ValueError: on unknown or unusable arguments.
    """
    return linear_kd_objective(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale_by_temperature_squared),
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        reduction=reduction,
        chunk_tokens=chunk_tokens,
        teacher_head_dtype=teacher_head_dtype,
        backend=backend,
        return_metrics=return_metrics,
    )


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


def linear_kd_objective(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | Float8Weight | None,
    labels: Tensor,
    objective: Objective,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    whole = isinstance(chunk_tokens, int) and not isinstance(chunk_tokens, bool)
    if chunk_tokens is not None and not (whole and chunk_tokens > 0):
        raise ValueError(f"chunk_tokens must be a whole number above 0 or None, but got {chunk_tokens!r}")
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
    teacher_scale = None
    if not has_teacher:
        teacher_hidden = teacher_weight = teacher_bias = None
    else:
        assert teacher_hidden is not None and teacher_weight is not None  # or it would have been refused above
        check_teacher("teacher_hidden", teacher_hidden, student_hidden)
        teacher_hidden, teacher_weight, teacher_bias, teacher_scale = _teacher_head(
            teacher_hidden, teacher_weight, teacher_bias, teacher_head_dtype
        )
        teacher_hidden = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
        vocab = shared_vocab(vocab, (teacher_weight if teacher_scale is None else teacher_scale).shape[0])
    flat_labels = check_labels(labels, vocab, objective.ignore_index)

    trainable = (t for t in (student_hidden, student_weight, student_bias) if t is not None)
    want_grad = torch.is_grad_enabled() and any(t.requires_grad for t in trainable)
    plan = Plan(objective, metrics, vocab, reduction, has_teacher, want_grad)
    backend = resolve_backend(backend, student_hidden, teacher_hidden)
    apply = linear_kd_op if torch.compiler.is_compiling() else LinearKD.apply
    with torch.autocast(autocast_type(student_hidden.device), enabled=False):
        loss, sums, count = apply(
            student_hidden.reshape(-1, student_hidden.shape[-1]),
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            teacher_scale,
            flat_labels,
            plan,
            chunk_tokens,
            backend,
        )
    return _result(loss, sums, count, plan, student_hidden.shape[:-1], return_metrics)


def _teacher_head(
    hidden: Tensor, weight: Tensor | Float8Weight, bias: Tensor | None, head_dtype: str | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the teacher's hidden states, head, bias, and scales where the head is in 8-bit floats."""
    if not isinstance(weight, Float8Weight):
        for name, tensor in (("teacher_weight", weight), ("teacher_bias", bias)):
            if tensor is not None:
                check_teacher(name, tensor, None)
        hidden, weight, bias = check_head("teacher", hidden, weight, bias)
        if head_dtype is None:
            return hidden, weight, bias, None
        check_float8_source("teacher_weight", weight)
        weight = float8_weight(weight)
    hidden, (data, scale), bias = check_float8_head(hidden, weight, bias)
    return hidden, data, bias, scale


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
