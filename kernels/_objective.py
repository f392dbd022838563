"""What is minimised, and what is watched beside it: their settings, and the checks these must pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real

# Name -> default of ``beta``; None where the divergence has no such parameter.
DEFAULT_BETA = {
    "forward_kl": None,
    "reverse_kl": None,
    "symmetric_kl": 0.5,
    "jsd": 0.5,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "tvd": None,
}

DIVERGENCES = tuple(DEFAULT_BETA)

# Beyond them distributions are single ids or uniform; far beyond, logits/T and T² leave the range of fp32.
TEMPERATURES = (1e-3, 1e3)

# By how much the log-ratio that stands for +inf in a gradient exceeds the row's largest finite one.
BEYOND_FINITE = 80.0

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

# The same for stored ids of a teacher, where bounds have names of their own.
TEACHER, TOP_IDS, TAIL_AT_1, ENTROPY = "teacher", "its likeliest ids", "its tail at T = 1", "its entropy"
_SPARSE_NEEDS = {
    "class_loss": set(),
    "teacher_class_loss_cells": {TEACHER, TAIL_AT_1},
    "kd_loss": {TEACHER},
    "kl_cells": {TEACHER, TAIL_AT_1},
    "top1_agreement": {TEACHER, TOP_IDS},
    "student_entropy": set(),
    "teacher_entropy": {TEACHER, ENTROPY},
    "acceptance_rate_cells": {TEACHER, TAIL_AT_1},
}

SPARSE_METRICS = tuple(_SPARSE_NEEDS)
_READ_TEACHER = {name for name, needs in (_NEEDS | _SPARSE_NEEDS).items() if TEACHER in needs}
_COUNT = "num_tokens"


@dataclass(frozen=True)
class Objective:
    r"""Define the loss of one token: :math:`(1-\alpha)\,\mathrm{CE} + \alpha\,T^2 D(p_T, q_T)`.

    Args:
        divergence (str): one of :data:`DIVERGENCES`.
        beta (float | None): parameter of the divergence; None takes its default.
        temperature (float): T in [0.001, 1000], divides both models' logits inside D.
        kd_ratio (float): α, weight of the divergence against the cross-entropy.
        ignore_index (int): label of the tokens that do not count.
        scale_by_temperature_squared (bool): multiply D by T².

    Raises:
        ValueError: if a setting is unknown or out of range.
    """

    divergence: str = "forward_kl"
    beta: float | None = None
    temperature: float = 1.0
    kd_ratio: float = 1.0
    ignore_index: int = -100
    scale_by_temperature_squared: bool = True

    def __post_init__(self) -> None:
        if self.divergence not in DEFAULT_BETA:
            near = get_close_matches(str(self.divergence), DIVERGENCES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, but got {self.divergence!r}{hint}")
        default = DEFAULT_BETA[self.divergence]
        if self.beta is None:
            object.__setattr__(self, "beta", default)
        elif default is None:
            raise ValueError(f"{self.divergence} has no beta, but got beta={self.beta}; leave beta out")
        elif not (is_number(self.beta) and 0.0 <= self.beta <= 1.0):
            raise ValueError(f"beta must be a number in [0, 1], but got {self.beta!r}")
        low, high = TEMPERATURES
        if not (is_number(self.temperature) and low <= self.temperature <= high):
            raise ValueError(f"temperature must be a number from {low:g} to {high:g}, but got {self.temperature!r}")
        if not (is_number(self.kd_ratio) and 0.0 <= self.kd_ratio <= 1.0):
            raise ValueError(f"kd_ratio must be a number in [0, 1], but got {self.kd_ratio!r}")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index must be an integer, but got {self.ignore_index!r}")
        if not isinstance(self.scale_by_temperature_squared, bool):
            got = self.scale_by_temperature_squared
            raise ValueError(f"scale_by_temperature_squared must be True or False, but got {got!r}")
        # whole numbers would be compiled into kernels of their own
        for name in ("temperature", "kd_ratio", "beta"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    @property
    def computed_divergence(self) -> str:
        """Name the divergence to compute, which at the ends of beta is another one.

        There ``jsd`` vanishes and means a KL, by convention (Agarwal et al. 2024); a skewed KL at 0 is the plain one;
        of the symmetric KL one part is left, and the other may be infinite.
        """
        if self.divergence == "symmetric_kl" and self.beta in (0.0, 1.0):
            return "reverse_kl" if self.beta == 0.0 else "forward_kl"
        if self.divergence == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        if self.divergence in ("skew_forward_kl", "skew_reverse_kl") and self.beta == 0.0:
            return self.divergence.removeprefix("skew_")
        return self.divergence

    @property
    def divergence_scale(self) -> float:
        """Factor of D in the printed ``kd_loss``: T² or 1."""
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0


def is_number(value: object) -> bool:
    """Return whether `value` is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def resolve_metrics(request: bool | Sequence[str], has_teacher: bool, has_labels: bool) -> tuple[str, ...]:
    """Return the names to compute, in the order of :data:`METRICS`.

    Raises:
        ValueError: if a name is unknown or needs an input that is not there.
    """
    return _resolved(
        request, _NEEDS, {name for name, there in (("teacher", has_teacher), ("labels", has_labels)) if there}
    )


def resolve_sparse_metrics(request: bool | Sequence[str], here: set[str]) -> tuple[str, ...]:
    """Return the names to compute, in the order of :data:`SPARSE_METRICS`; `here` is what the call gives.

    Raises:
        ValueError: if a name is unknown or needs what is not in `here`.
    """
    return _resolved(request, _SPARSE_NEEDS, here)


def _resolved(request: bool | Sequence[str], needs: dict[str, set[str]], here: set[str]) -> tuple[str, ...]:
    """Return the names of `needs` that are requested; all that `here` suffices for if the request is True."""
    if isinstance(request, bool):
        return tuple(name for name in needs if request and needs[name] <= here)
    names = {request} if isinstance(request, str) else set(request)
    for name in sorted(names - {_COUNT}):
        if name not in needs:
            raise ValueError(f"metrics are {', '.join(needs)}, but return_metrics names {name!r}")
        if missing := needs[name] - here:
            raise ValueError(
                f"the metric {name!r} needs {' and '.join(sorted(missing))}, which this call does not give; "
                f"pass them or leave the metric out of return_metrics"
            )
    return tuple(name for name in needs if name in names)


def needs_teacher(kd_ratio: float, metrics: Sequence[str]) -> bool:
    """Return whether the objective or a metric reads the teacher."""
    return kd_ratio > 0.0 or any(name in _READ_TEACHER for name in metrics)
