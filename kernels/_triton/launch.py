"""What every launch of the Triton kernels needs: blocks, compile-time arguments, addresses.

Legend: N tokens, V vocabulary, B batch, S sequence.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._objective import METRICS
from .._plan import Plan, Rows
from .row_kernels import RESULTS

_LOG2_E = math.log2(math.e)
assert RESULTS.value == 1 + len(METRICS)


class Blocks(NamedTuple):
    """Say how a program walks its row."""

    size: int  # ids per step of the walk
    warps: int
    registers: int  # at most, per thread


# Every choice of blocks, warps and registers, with its reason. `python -m benchmarks.binaries` prints what they compile
# to; all have 8 ids a thread (one 128-bit load of bf16 per tensor and step) and none spills.
#
# variant        ids     warps  registers  why
# narrow rows    V up    4      168        one step over the whole row, with no warp idle from 1024 ids on
# two passes     2048    8      80         3 programs an SM: 24 warps have 24 KB of loads in flight; at 64 registers
#                                          symmetric KL spills
# three passes   2048    8      128        the logarithms of the mixtures need them
# with metrics   1024    4      168        nine sums live through the second pass; programs of 4 warps pack closer
_NARROW = 1024
_TWO_PASSES = Blocks(2048, 8, 80)
_THREE_PASSES = Blocks(2048, 8, 128)
_WITH_METRICS = Blocks(1024, 4, 168)


def blocks_for(vocab: int, three_passes: bool, metrics: bool) -> Blocks:
    """Return the line of the table above."""
    if vocab <= _NARROW:
        return Blocks(max(256, triton.next_power_of_2(vocab)), 4, 168)
    if metrics:
        return _WITH_METRICS
    return _THREE_PASSES if three_passes else _TWO_PASSES


def launch_options(warps: int, registers: int | None = None) -> dict[str, int | bool]:
    """Return the options of a launch, which every kernel of this folder is given.

    Args:
        warps (int): of a program.
        registers (int | None): at most so many per thread; None for no bound.
    """
    # From 3.10 on Triton fuses multiply-adds only where it is told to; without them a row takes 15 % more instructions.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None and torch.version.hip is None:  # AMD's backend refuses the word
        options["maxnreg"] = registers
    return options


class Variant(NamedTuple):
    """Hold the compile-time arguments of the kernels, one binary each; field names are theirs."""

    DIVERGENCE: str
    HAS_TEACHER: bool
    HAS_KD: bool
    HAS_CE: bool
    HAS_LABELS: bool
    AT_TEMPERATURE_1: bool
    METRICS: bool
    GRADIENT: bool
    THREE_PASSES: bool
    BACKWARDS: bool


def variant_of(plan: Plan, has_labels: bool, backwards: bool = False) -> Variant:
    """Return the variant that computes what `plan` needs, and no more."""
    objective, wanted = plan.objective, set(plan.metrics)
    name = objective.computed_divergence
    has_kd = objective.kd_ratio > 0.0 or "kd_loss" in wanted
    has_ce = objective.kd_ratio < 1.0
    metrics = bool(wanted - {"kd_loss", "class_loss", "teacher_class_loss"})
    # a label's logit is read beside the statistics of its model at T = 1
    at_temperature_1 = has_ce or metrics or bool(wanted & {"class_loss", "teacher_class_loss"})
    return Variant(
        DIVERGENCE=name,
        HAS_TEACHER=plan.has_teacher,
        HAS_KD=has_kd,
        HAS_CE=has_ce,
        HAS_LABELS=has_labels,
        AT_TEMPERATURE_1=has_kd and objective.temperature != 1.0 and at_temperature_1,
        METRICS=metrics,
        GRADIENT=plan.want_grad,
        THREE_PASSES=has_kd and name not in ("forward_kl", "reverse_kl", "symmetric_kl"),
        BACKWARDS=backwards,
    )


class Factors(NamedTuple):
    """Hold the numbers of the objective as the kernels take them; field names are theirs."""

    c: float  # log2(e)/T
    beta: float
    one_minus_beta: float
    kd_ratio: float  # weight of the divergence in the loss
    kd_scale: float  # factor of the divergence, T² or 1
    kd_slope: float  # weight of dD/dz in the gradient, z = s/T
    ce_weight: float  # of the cross-entropy in the loss


def factors_of(plan: Plan, variant: Variant) -> Factors:
    """Return the factors of the plan's objective; T is 1 where no divergence is computed."""
    objective = plan.objective
    beta = 0.0 if objective.beta is None else objective.beta
    return Factors(
        c=_LOG2_E / (objective.temperature if variant.HAS_KD else 1.0),
        beta=beta,
        one_minus_beta=1.0 - beta,  # rounded to fp32 by itself, because near 1 a difference from a rounded beta is 0
        kd_ratio=objective.kd_ratio,
        kd_scale=objective.divergence_scale,
        kd_slope=objective.kd_ratio * objective.divergence_scale / objective.temperature,
        ce_weight=1.0 - objective.kd_ratio,
    )


def addressed(name: str, tensor: Tensor) -> dict[str, Tensor | int]:
    """Return a tensor of logits and the addresses of its rows, as the keywords that a kernel has for `name`."""
    inner, outer_stride, inner_stride, stride = _addresses(tensor)
    return {
        name: tensor,
        f"{name}_inner": inner,
        f"{name}_outer_stride": outer_stride,
        f"{name}_inner_stride": inner_stride,
        f"{name}_stride": stride,
    }


def _addresses(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return inner size, outer and inner stride of the rows, and the stride of the ids."""
    if tensor.dim() == 2:
        return 1, tensor.stride(0), 0, tensor.stride(1)
    try:
        flat = tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return tensor.shape[1], *tensor.stride()
    return 1, flat.stride(0), 0, flat.stride(1)


def on_device(device: torch.device):
    """Make `device` the current one, on which Triton launches, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def rows_of(results: Tensor, plan: Plan) -> Rows:
    """Return the plan's share of ``results`` ``[N, RESULTS]``."""
    columns = [results[:, 1 + METRICS.index(name)] for name in plan.metrics]
    return Rows(results[:, 0].contiguous(), torch.stack(columns) if columns else results.new_empty(0, len(results)))
