"""The public functions and the checks of their arguments.

Legend: N tokens, V vocabulary, D hidden width, B batch, S sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._block import Plan
from ._eager import runs_eagerly
from ._linear import LinearKD
from ._metrics import needs_teacher, resolve_metrics
from ._objective import Objective
from ._softmax import SoftmaxKD
from ._vocab import shared_vocab

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "torch")

Result = Tensor | tuple[Tensor, dict[str, Tensor]]


@runs_eagerly
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
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
) -> Result:
    r"""Distillation loss of given logits.

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
    fp64 where an input is fp64. The gradient, to the student alone, is computed together with the loss; it
    is not twice differentiable. Without a valid token the loss is 0 and so is the gradient. An id at -inf in
    both models contributes nothing; where D is +inf the value is +inf and the gradient stays finite.
    Vocabularies that differ by less than 1024 ids are cut to the shared prefix. Inside ``torch.compile`` the
    call runs eagerly.

    Args:
        student_logits (Tensor): ``[N, V]`` or ``[B, S, V]``, bf16, fp16, fp32 or fp64, any strides.
        teacher_logits (Tensor | None): the same leading shape, any of these dtypes, not requiring grad. Not
            touched, and may be None, if `kd_ratio` is 0 and no metric asks for it.
        labels (Tensor | None): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`. None makes every
            token valid and needs `kd_ratio` 1. Values are checked on the CPU only (elsewhere that would wait
            for the device).
        divergence (str): D, one of :data:`DIVERGENCES`.
        beta (float | None): in [0, 1]; None takes the default of the table.
        temperature (float): T > 0.
        kd_ratio (float): α in [0, 1]. At 1 no cross-entropy is computed.
        ignore_index (int): label of tokens that do not count.
        reduction (str): "mean" over valid tokens, "sum", or "none" (the labels' shape, 0 at ignored tokens).
        scale_by_temperature_squared (bool): multiply D by T², which keeps gradients comparable across T.
        backend (str): "auto" or "torch".
        return_metrics (bool | Sequence[str]): True for all of :data:`METRICS` that the inputs define, or the
            names of some.

    Returns:
        Tensor | tuple[Tensor, dict[str, Tensor]]: the loss in fp32 (fp64), and with `return_metrics` a dict
        of detached fp32 0-d tensors: sums over the valid tokens, so that microbatches and ranks add up, and
        ``num_tokens`` to divide by.

    Raises:
        ValueError: on unknown or unusable arguments.
    """
    objective = Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale_by_temperature_squared)
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_backend(backend)
    _check_rows("student_logits", student_logits, "V", labels)
    if labels is None and kd_ratio != 1.0:
        raise ValueError(f"kd_ratio={kd_ratio} includes a cross-entropy, which needs labels; pass them or kd_ratio=1")
    metrics = resolve_metrics(return_metrics, teacher_logits is not None, labels is not None)
    _check_teacher_present("teacher_logits", teacher_logits, objective)
    vocab = student_logits.shape[-1]
    has_teacher = needs_teacher(objective.kd_ratio, metrics)
    if not has_teacher:
        teacher_logits = None
    else:
        _check_teacher("teacher_logits", teacher_logits, student_logits)
        vocab = shared_vocab(vocab, teacher_logits.shape[-1])
    flat_labels = None
    if labels is not None:
        flat_labels = _check_labels(labels, vocab, ignore_index).to(student_logits.device, non_blocking=True)

    want_grad = torch.is_grad_enabled() and student_logits.requires_grad
    plan = Plan(objective, metrics, vocab, reduction, has_teacher, want_grad)
    return _run(
        SoftmaxKD,
        plan,
        student_logits.shape[:-1],
        return_metrics,
        student_logits,
        teacher_logits,
        flat_labels,
        plan,
    )


@runs_eagerly
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = True,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
) -> Result:
    r"""Distillation loss from hidden states: that of ``hidden @ weight.T``, without ever holding ``[N, V]``.

    Ignored tokens are dropped before the matrix products. The rest is worked through in chunks: at most one
    chunk of logits of each model exists at a time, and the student's is overwritten by its gradient.
    Gradients are computed for those of `student_hidden`, `student_weight` and `student_bias` that require
    one (none for a frozen head, none at all under ``no_grad``); a head's is accumulated in fp32. Logits are
    rounded to the models' dtype, as a linear layer's are; the loss arithmetic is that of
    :func:`softmax_kd_loss`. Under autocast the products run in autocast's dtype.

    Args:
        student_hidden (Tensor): last hidden states ``[N, D]`` or ``[B, S, D]``, bf16, fp16, fp32 or fp64.
        student_weight (Tensor): output projection ``[V, D]``, of the same dtype.
        teacher_hidden (Tensor | None): the same leading shape, a width of its own. Not touched, and may be
            None, if `kd_ratio` is 0 and no metric asks for it; so may `teacher_weight`.
        teacher_weight (Tensor | None): ``[V, D]`` of the teacher.
        labels (Tensor): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`. May stay on the CPU
            while the rest is on a device: then finding the valid tokens does not wait for it.
        student_bias (Tensor | None): ``[V]``.
        divergence (str): see :func:`softmax_kd_loss`, as for all arguments down to
            `scale_by_temperature_squared`.
        beta (float | None): parameter of the divergence.
        temperature (float): T > 0.
        kd_ratio (float): α in [0, 1].
        ignore_index (int): label of tokens that do not count.
        reduction (str): "mean", "sum" or "none". "none" with a trainable head computes its products twice.
        scale_by_temperature_squared (bool): multiply D by T².
        chunk_tokens (int | None): tokens per chunk; None chooses them so that both chunks of logits take at
            most 256 MiB on a CPU and 1 GiB elsewhere (and at least 128 tokens).
        backend (str): "auto" or "torch".
        return_metrics (bool | Sequence[str]): see :func:`softmax_kd_loss`.

    Returns:
        Tensor | tuple[Tensor, dict[str, Tensor]]: as :func:`softmax_kd_loss`.

    Raises:
        ValueError: on unknown or unusable arguments.
    """
    objective = Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale_by_temperature_squared)
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_backend(backend)
    if chunk_tokens is not None and not (isinstance(chunk_tokens, int) and chunk_tokens > 0):
        raise ValueError(f"chunk_tokens must be a whole number above 0 or None, but got {chunk_tokens!r}")
    if labels is None:
        raise ValueError("linear_kd_loss needs labels [N] to know the valid tokens, but got None")
    _check_rows("student_hidden", student_hidden, "D", labels)
    teacher_given = teacher_hidden is not None and teacher_weight is not None
    metrics = resolve_metrics(return_metrics, teacher_given, True)
    _check_teacher_present("teacher_hidden", teacher_hidden, objective)
    _check_teacher_present("teacher_weight", teacher_weight, objective)
    has_teacher = needs_teacher(objective.kd_ratio, metrics)
    if not has_teacher:
        teacher_hidden = teacher_weight = None
    student_hidden, student_weight = _check_head("student", student_hidden, student_weight)
    vocab = student_weight.shape[0]
    if student_bias is not None:
        if student_bias.shape != (vocab,):
            raise ValueError(f"student_bias must be [V] = [{vocab}], but got {list(student_bias.shape)}")
        student_bias = student_bias.to(student_weight.dtype)
    if has_teacher:
        _check_teacher("teacher_hidden", teacher_hidden, student_hidden)
        _check_teacher("teacher_weight", teacher_weight, None)
        teacher_hidden, teacher_weight = _check_head("teacher", teacher_hidden, teacher_weight)
        teacher_hidden = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
        vocab = shared_vocab(vocab, teacher_weight.shape[0])
    flat_labels = _check_labels(labels, vocab, ignore_index)

    trainable = (t for t in (student_hidden, student_weight, student_bias) if t is not None)
    want_grad = torch.is_grad_enabled() and any(t.requires_grad for t in trainable)
    plan = Plan(objective, metrics, vocab, reduction, has_teacher, want_grad)
    with torch.autocast(student_hidden.device.type, enabled=False):
        return _run(
            LinearKD,
            plan,
            student_hidden.shape[:-1],
            return_metrics,
            student_hidden.reshape(-1, student_hidden.shape[-1]),
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            flat_labels,
            plan,
            chunk_tokens,
        )


def _run(function: type, plan: Plan, shape: torch.Size, return_metrics: object, *args: object) -> Result:
    loss, sums, count = function.apply(*args)
    if plan.reduction == "none":
        loss = loss.view(shape)
    if return_metrics is False:
        return loss
    metrics = dict(zip(plan.metrics, sums.unbind(), strict=True))
    metrics["num_tokens"] = count.float()
    return loss, metrics


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but got {value!r}")


def _check_backend(backend: str) -> None:
    if backend == "triton":
        raise ValueError("backend='triton' is not part of this version; use 'torch' or 'auto'")
    _check_choice("backend", backend, BACKENDS)


def _check_rows(name: str, tensor: Tensor, width: str, labels: Tensor | None) -> None:
    """2-D or 3-D, floating, not empty in its last dimension, and with one label per row."""
    if tensor.dim() not in (2, 3) or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must be [N, {width}] or [B, S, {width}], but got {list(tensor.shape)}")
    _check_floating(name, tensor)
    if labels is not None and labels.shape != tensor.shape[:-1]:
        raise ValueError(
            f"labels must have one entry per row of {name}, {list(tensor.shape[:-1])}, but got {list(labels.shape)}"
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, but got {tensor.dtype}")


def _check_labels(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Flat int64 labels ``[N]``."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, but got {labels.dtype}")
    labels = labels.reshape(-1).long()
    if labels.device.type == "cpu":
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        if wrong.any():
            raise ValueError(
                f"labels must lie in [0, {vocab}) or equal ignore_index={ignore_index}, "
                f"but one is {labels[wrong][0].item()}"
            )
    return labels


def _check_teacher_present(name: str, tensor: Tensor | None, objective: Objective) -> None:
    if tensor is None and objective.kd_ratio > 0.0:
        raise ValueError(f"kd_ratio={objective.kd_ratio} needs a teacher, but {name} is None; pass it or kd_ratio=0")


def _check_teacher(name: str, tensor: Tensor, like: Tensor | None) -> None:
    """Floating, frozen, and with the leading shape and device of `like`."""
    _check_floating(name, tensor)
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad, the teacher is not trained; pass {name}.detach()")
    if like is not None and (tensor.shape[:-1] != like.shape[:-1] or tensor.shape[-1] == 0):
        raise ValueError(
            f"{name} must have the student's leading shape {list(like.shape[:-1])}, but got {list(tensor.shape)}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on the student's device {like.device}, but is on {tensor.device}")


def _check_head(model: str, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and head in one dtype: autocast's where it is on, otherwise the one they share."""
    _check_floating(f"{model}_weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{model}_weight must be [V, {hidden.shape[-1]}] to fit {model}_hidden, but got {list(weight.shape)}"
        )
    if hidden.device != weight.device:
        raise ValueError(
            f"{model}_weight must be on the device of {model}_hidden, {hidden.device}, but is on {weight.device}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{model}_hidden and {model}_weight must have one dtype, but got {hidden.dtype} and "
            f"{weight.dtype}; convert one of them or use torch.autocast"
        )
    return hidden, weight
