"""The objective from its formula, in the dtype of its inputs; the truth is fp64. Nothing of the kernels is used.

Legend: N tokens, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
BETA = {"symmetric_kl": 0.5, "jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}  # the defaults


def mean_objective(
    student: Tensor, teacher: Tensor, labels: Tensor, divergence: str, temperature: float, kd_ratio: float
) -> Tensor:
    """Return the mean over the valid tokens of logits ``[N, V]``; 0 if there is none."""
    total = token_objective(student, teacher, labels, divergence, temperature, kd_ratio).sum()
    return total / (labels != IGNORE).sum().clamp(min=1)


def token_objective(
    student: Tensor, teacher: Tensor, labels: Tensor, divergence: str, temperature: float, kd_ratio: float
) -> Tensor:
    """Return (1-α) CE + α T² D of every token ``[N]``, 0 where its label is ignored."""
    loss = torch.zeros(labels.shape, dtype=student.dtype, device=student.device)
    if kd_ratio > 0:
        log_p = torch.log_softmax(teacher / temperature, -1)
        log_q = torch.log_softmax(student / temperature, -1)
        loss = loss + kd_ratio * temperature**2 * token_divergence(divergence, log_p, log_q)
    if kd_ratio < 1:
        loss = loss + (1 - kd_ratio) * F.cross_entropy(student, labels, ignore_index=IGNORE, reduction="none")
    return loss.where(labels != IGNORE, 0.0)


def token_divergence(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return D(p, q) ``[N]`` with the default beta."""
    beta = BETA.get(name)
    if name == "forward_kl":
        return _kl(log_p, log_q)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    if name == "symmetric_kl":
        return beta * _kl(log_p, log_q) + (1 - beta) * _kl(log_q, log_p)
    if name == "jsd":
        log_m = _mix(beta, log_p, log_q)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if name == "skew_forward_kl":
        return _kl(log_p, _mix(beta, log_p, log_q))
    if name == "skew_reverse_kl":
        return _kl(log_q, _mix(beta, log_q, log_p))
    if name == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    raise ValueError(f"unknown divergence {name}")


def metric_sums(student: Tensor, teacher: Tensor, labels: Tensor, divergence: str, temperature: float) -> dict:
    """Return the sums over the valid tokens of what ``return_metrics=True`` gives."""
    valid = labels != IGNORE
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    p, q = log_p.exp(), log_q.exp()
    per_token = {
        "class_loss": F.cross_entropy(student, labels, ignore_index=IGNORE, reduction="none"),
        "teacher_class_loss": F.cross_entropy(teacher, labels, ignore_index=IGNORE, reduction="none"),
        "kd_loss": token_objective(student, teacher, labels, divergence, temperature, 1.0),
        "kl": _kl(log_p, log_q),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype),
        "student_entropy": -(q * log_q).sum(-1),
        "teacher_entropy": -(p * log_p).sum(-1),
        "acceptance_rate": torch.minimum(p, q).sum(-1),
    }
    return {name: value.where(valid, 0.0).sum().item() for name, value in per_token.items()}


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(weight·a + (1-weight)·b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log(1 - weight))
