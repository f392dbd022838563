"""The formulas of the seven divergences in plain torch, independent of the implementation.

They compute in the dtype they are given; the truth is fp64. Legend: N tokens, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F


def _kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(weight, log_a, log_b):
    """log(weight·a + (1-weight)·b)."""
    if weight == 0.0:
        return log_b
    if weight == 1.0:
        return log_a
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log(1 - weight))


def divergence_of(name, beta, log_p, log_q):
    if name == "forward_kl" or (name == "jsd" and beta == 0.0):
        return _kl(log_p, log_q)
    if name == "reverse_kl" or (name == "jsd" and beta == 1.0):
        return _kl(log_q, log_p)
    if name == "symmetric_kl":
        return beta * _kl(log_p, log_q) + (1 - beta) * _kl(log_q, log_p)
    if name == "jsd":
        log_m = _mix(beta, log_p, log_q)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if name == "skew_forward_kl":
        return _kl(log_p, _mix(beta, log_p, log_q))
    if name == "skew_reverse_kl":
        return _kl(log_q, _mix(1 - beta, log_p, log_q))
    if name == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    raise AssertionError(name)


def tokens(student, teacher, labels, divergence, beta=None, temperature=1.0, kd_ratio=1.0, scale=True):
    """Loss of every token ``[N]``, differentiable, 0 where the label is -100."""
    valid = labels != -100
    loss = torch.zeros(labels.shape, dtype=student.dtype)
    if kd_ratio > 0:
        log_p = torch.log_softmax(teacher / temperature, -1)
        log_q = torch.log_softmax(student / temperature, -1)
        factor = temperature**2 if scale else 1.0
        loss = loss + kd_ratio * factor * divergence_of(divergence, beta, log_p, log_q)
    if kd_ratio < 1:
        loss = loss + (1 - kd_ratio) * F.cross_entropy(student, labels, ignore_index=-100, reduction="none")
    return loss.where(valid, 0.0)


def mean(student, teacher, labels, *args, **kwargs):
    """Mean over the valid tokens, 0 if there is none."""
    total = tokens(student, teacher, labels, *args, **kwargs).sum()
    return total / (labels != -100).sum().clamp(min=1)
