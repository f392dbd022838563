"""What a distillation run is watched by, one number per token, all at T = 1.

Legend: n rows of a block, V vocabulary; p teacher, q student.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._divergences import Distributions, Softmax, divergence

# Name -> what it needs beside the student's logits.
_NEEDS = {
    "class_loss": {"labels"},
    "teacher_class_loss": {"labels", "teacher"},
    "kd_loss": {"teacher"},
    "kl": {"teacher"},
    "top1_agreement": {"teacher"},
    "student_entropy": set(),
    "teacher_entropy": {"teacher"},
    "acceptance_rate": {"teacher"},
}

METRICS = tuple(_NEEDS)
_COUNT = "num_tokens"


def resolve_metrics(request: bool | Sequence[str], has_teacher: bool, has_labels: bool) -> tuple[str, ...]:
    """The names to compute, in the order of :data:`METRICS`.

    Raises:
        ValueError: if a name is unknown or needs an input that is not there.
    """
    here = {name for name, there in (("teacher", has_teacher), ("labels", has_labels)) if there}
    if isinstance(request, bool):
        return tuple(name for name in METRICS if request and _NEEDS[name] <= here)
    names = {request} if isinstance(request, str) else set(request)
    for name in sorted(names - {_COUNT}):
        if name not in _NEEDS:
            raise ValueError(f"metrics are {', '.join(METRICS)}, but return_metrics names {name!r}")
        if missing := _NEEDS[name] - here:
            raise ValueError(
                f"the metric {name!r} needs {' and '.join(sorted(missing))}, which this call does not give; "
                f"pass them or leave the metric out of return_metrics"
            )
    return tuple(name for name in METRICS if name in names)


def needs_teacher(kd_ratio: float, metrics: Sequence[str]) -> bool:
    """Whether the objective or a metric reads the teacher."""
    return kd_ratio > 0.0 or any("teacher" in _NEEDS[name] for name in metrics)


def entropy(of: Softmax, x: Tensor) -> Tensor:
    """-Σ p·log p ``[n]`` in nats, as log Σ exp(u) - Σ p·u; `x` is scratch ``[n, V]``."""
    # a finite u where p is 0, so that their product is 0 and only a NaN gives a NaN
    mean = torch.clamp(of.u, min=torch.finfo(of.u.dtype).min, out=x).mul_(of.prob).sum(-1)
    return of.total.log().squeeze(-1) - mean


def kl(dist: Distributions, r: Tensor, x: Tensor) -> Tensor:
    """KL(p‖q) ``[n]`` in nats; `r` and `x` are scratch ``[n, V]``."""
    return divergence("forward_kl", None, dist, r, x, None)


def acceptance_rate(dist: Distributions, x: Tensor) -> Tensor:
    """Σ min(p, q) ``[n]``, the expected acceptance rate of speculative decoding (Leviathan et al. 2023)."""
    return torch.minimum(dist.p, dist.q, out=x).sum(-1)


def top1_agreement(dist: Distributions) -> Tensor:
    """1 where both models rank the same id first, else 0 ``[n]``; any temperature. Of ties the first id counts."""
    return _argmax(dist.teacher.u) == _argmax(dist.student.u)


def _argmax(values: Tensor) -> Tensor:
    """``values.argmax(-1)`` of ``[n, V]``, at a fifth of its time on a CPU, where it costs as much as ten maxima.

    The first run of ids that holds the maximum is found first, then the id within it.
    """
    vocab = values.shape[-1]
    run = math.isqrt(vocab)  # ids per partial maximum
    whole = vocab // run * run
    tops = values[:, :whole].unflatten(-1, (-1, run)).amax(-1)
    if whole < vocab:
        tops = torch.cat([tops, values[:, whole:].amax(-1, keepdim=True)], -1)
    # the last run may be short: it is read together with ids before it, all of which are smaller
    start = (tops.argmax(-1, keepdim=True) * run).clamp_(max=vocab - run)
    within = values.gather(-1, start + torch.arange(run, device=values.device)).argmax(-1)
    return start.squeeze(-1) + within
