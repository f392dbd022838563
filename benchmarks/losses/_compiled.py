"""Count what our kernel issues for a logit, from its machine code; :mod:`benchmarks.binaries` counts it."""

import functools
from typing import Any

import torch

from ._case import Case


def instructions_per_logit(case: Case) -> float | None:
    """Return how many instructions the kernel of a case has for each logit, or None where that cannot be counted."""
    try:
        from .._launches import Case as Launch
        from .._launches import binaries_of

        launch = Launch(
            case.divergence if case.kd_ratio > 0 else "",
            case.temperature,
            case.kd_ratio < 1,
            case.gradient,
            case.metrics,
            row_scale=case.op == "linear" and case.trainable_head and case.gradient,
        )
        return _instructions(binaries_of(launch, case.vocab)[0])
    except Exception:  # without Triton, or with one whose tools are others: what was measured is good without it
        return None


@functools.cache
def _instructions(binary: Any) -> float | None:
    from ..binaries import passes_of

    major, minor = torch.cuda.get_device_capability()
    return sum(one.instructions for one in passes_of(binary, 10 * major + minor)) or None
