"""What a distillation run is watched by, one number per token, all at T = 1.

Legend: n rows of a block, V vocabulary; p teacher, q student.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._divergences import Distributions, divergence

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


def entropy(log_p: Tensor, p: Tensor, x: Tensor) -> Tensor:
    """-Σ p·log p ``[n]`` in nats; `x` is scratch ``[n, V]``."""
    return -torch.mul(log_p, p, out=x).nan_to_num_(nan=0.0).sum(-1)


def kl(dist: Distributions, r: Tensor, x: Tensor) -> Tensor:
    """KL(p‖q) ``[n]`` in nats; `r` and `x` are scratch ``[n, V]``."""
    return divergence("forward_kl", None, dist, r, x, None)


def acceptance_rate(dist: Distributions, x: Tensor) -> Tensor:
    """Σ min(p, q) ``[n]``, the expected acceptance rate of speculative decoding (Leviathan et al. 2023)."""
    return torch.minimum(dist.p, dist.q, out=x).sum(-1)


def top1_agreement(dist: Distributions) -> Tensor:
    """1 where the id that the teacher ranks first is first for the student too, else 0 ``[n]``; any temperature."""
    first = dist.log_p.argmax(-1, keepdim=True)
    # a maximum costs a CPU a tenth of an argmax
    return (dist.log_q.gather(-1, first) == dist.log_q.amax(-1, keepdim=True)).squeeze(-1)
