"""The oracle: the formulas of the seven divergences in plain torch, independent of the implementation.

Legend: N tokens, V vocabulary, D hidden width.
"""

import math
from types import SimpleNamespace

import pytest
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


def _divergence(name, beta, log_p, log_q):
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


def _tokens(student, teacher, labels, divergence, beta=None, temperature=1.0, kd_ratio=1.0, scale=True):
    """Loss of every token ``[N]``, differentiable, 0 where the label is -100."""
    valid = labels != -100
    loss = torch.zeros(labels.shape, dtype=student.dtype)
    if kd_ratio > 0:
        log_p = torch.log_softmax(teacher / temperature, -1)
        log_q = torch.log_softmax(student / temperature, -1)
        factor = temperature**2 if scale else 1.0
        loss = loss + kd_ratio * factor * _divergence(divergence, beta, log_p, log_q)
    if kd_ratio < 1:
        loss = loss + (1 - kd_ratio) * F.cross_entropy(student, labels, ignore_index=-100, reduction="none")
    return loss.where(valid, 0.0)


def _mean(student, teacher, labels, *args, **kwargs):
    """Mean over the valid tokens, 0 if there is none."""
    total = _tokens(student, teacher, labels, *args, **kwargs).sum()
    return total / (labels != -100).sum().clamp(min=1)


@pytest.fixture(scope="session")
def oracle():
    """`oracle.tokens` and `oracle.mean` compute in the dtype they are given; the truth is fp64."""
    return SimpleNamespace(tokens=_tokens, mean=_mean)


# Every divergence at its default, at a lopsided beta, and at the ends where formulas change.
VARIANTS = [
    ("forward_kl", None),
    ("reverse_kl", None),
    *(("symmetric_kl", beta) for beta in (0.0, 0.3, 0.5, 1.0)),
    *(("jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(("skew_forward_kl", beta) for beta in (0.0, 0.1, 0.7, 1.0)),
    *(("skew_reverse_kl", beta) for beta in (0.0, 0.1, 0.7, 1.0)),
    ("tvd", None),
]


def pytest_generate_tests(metafunc):
    """Tests that take `divergence` and `beta` run for every variant; `divergence` alone for every default."""
    names = metafunc.fixturenames
    if "divergence" in names and "beta" in names:
        metafunc.parametrize(("divergence", "beta"), VARIANTS)
    elif "divergence" in names:
        metafunc.parametrize(
            "divergence",
            ["forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"],
        )
