"""What every launch of the Triton kernels needs: blocks, compile-time arguments, addresses.

Legend: N tokens, V vocabulary, B batch, S sequence.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._checks import runs_interpreted
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
# to; those of 1024 ids have 8 a thread (in bf16 one 128-bit load per tensor and step), and none spills.
#
# variant                          ids     warps  registers  why
# narrow rows                      256 up  4      168        one step over the whole row, of 512 or 1024 ids if V asks
# forward KL, TVD, cross-entropy   1024    4      64         8 programs an SM: 32 warps, each with two blocks in flight
# reverse and symmetric KL         1024    4      72         7 programs; they would spill at 64 on an A100
# JSD                              1024    4      80         6 programs; it would spill at 72
# skewed KLs                       1024    4      88         5 programs; they would spill at 80
# with metrics of probabilities    1024    4      128        4 programs: sums of their own; agreement alone needs none
# the rest beside stored ids       1024    4      64         8 programs or more: one model's block, few sums
# all of these in fp32             1024    4      16 more    twice the registers for what is loaded
# with V no multiple of 16         1024    4      16 more    the mask of the last block takes an address for each id
# rows that start anywhere         1024    4      168        8 loads of one id each, and as many addresses
_NARROW = 1024
_REGISTERS = {"reverse_kl": 72, "symmetric_kl": 72, "jsd": 80, "skew_forward_kl": 88, "skew_reverse_kl": 88}
_REGISTERS_ELSE, _WITH_METRICS, _MORE, _MOST = 64, 128, 16, 168


def blocks_for(vocab: int, variant: "Variant", width: int) -> Blocks:
    """Return the line of the table above; `width` from ``width_of``."""
    registers = _REGISTERS.get(variant.DIVERGENCE, _REGISTERS_ELSE)
    if variant.KL or variant.ENTROPIES or variant.ACCEPTANCE:
        registers = _WITH_METRICS
    return _blocks(vocab, registers, width)


def rest_blocks_for(vocab: int, width: int) -> Blocks:
    """Return the line of the table above for the passes beside stored ids; `width` from ``width_of``."""
    return _blocks(vocab, _REGISTERS_ELSE, width)


def _blocks(vocab: int, registers: int, width: int) -> Blocks:
    """Return a line of the table whose whole blocks of bf16 take so many registers."""
    if vocab <= _NARROW or width == 1:
        return Blocks(min(1024, max(256, triton.next_power_of_2(vocab))), 4, _MOST)
    return Blocks(1024, 4, registers + _MORE * (width < 8) + _MORE * (vocab % 16 > 0))


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
    STUDENT_AT_1: bool
    TEACHER_AT_1: bool
    KL: bool
    ENTROPIES: bool
    AGREEMENT: bool
    ACCEPTANCE: bool
    GRADIENT: bool
    THREE_PASSES: bool
    BETA_ABOVE_HALF: bool
    APPROXIMATE: bool


def variant_of(plan: Plan, has_labels: bool) -> Variant:
    """Return the variant that computes what `plan` needs, and no more."""
    objective, wanted = plan.objective, set(plan.metrics)
    name = objective.computed_divergence
    has_kd = objective.kd_ratio > 0.0 or "kd_loss" in wanted
    has_ce = objective.kd_ratio < 1.0
    kl, acceptance = "kl" in wanted, "acceptance_rate" in wanted
    entropies = bool(wanted & {"student_entropy", "teacher_entropy"})
    of_probabilities = kl or entropies or acceptance
    # a label's logit is read beside the statistics of its model at T = 1
    two_temperatures = has_kd and objective.temperature != 1.0
    return Variant(
        DIVERGENCE=name,
        HAS_TEACHER=plan.has_teacher,
        HAS_KD=has_kd,
        HAS_CE=has_ce,
        HAS_LABELS=has_labels,
        STUDENT_AT_1=two_temperatures and (has_ce or of_probabilities or "class_loss" in wanted),
        TEACHER_AT_1=two_temperatures and plan.has_teacher and (of_probabilities or "teacher_class_loss" in wanted),
        KL=kl,
        ENTROPIES=entropies,
        AGREEMENT="top1_agreement" in wanted,
        ACCEPTANCE=acceptance,
        GRADIENT=plan.want_grad,
        THREE_PASSES=has_kd and name not in ("forward_kl", "reverse_kl", "symmetric_kl"),
        BETA_ABOVE_HALF=has_kd and name == "jsd" and objective.beta is not None and objective.beta > 0.5,
        APPROXIMATE=torch.version.hip is None and not runs_interpreted(),
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


def width_of(*tensors: Tensor) -> int:
    """Return how many neighbouring ids a thread loads, 128 bits of the widest dtype; 1 where rows start anywhere."""
    width = 16 // max(tensor.element_size() for tensor in tensors)
    round_ = all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride % width == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )
    return width if round_ else 1


def addressed(name: str, tensor: Tensor, width: int) -> dict[str, Tensor | int]:
    """Return a tensor of logits and the addresses of its rows, as the keywords that a kernel has for `name`.

    Args:
        width (int): from ``width_of``; strides of rows are given in multiples of it.
    """
    inner, outer_stride, inner_stride, stride = _addresses(tensor)
    return {
        name: tensor,
        f"{name}_inner": inner,
        f"{name}_outer_stride": outer_stride // width,
        f"{name}_inner_stride": inner_stride // width,
        f"{name}_stride": stride,
    }


def _addresses(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return inner size, outer and inner stride of the rows, and the stride of the ids."""
    if tensor.dim() == 2:
        return 1, tensor.stride(0), 0, tensor.stride(1)
    try:
        flat = tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        outer, inner, ids = tensor.stride()
        return tensor.shape[1], outer, inner, ids
    return 1, flat.stride(0), 0, flat.stride(1)


def on_device(device: torch.device):
    """Make `device` the current one, on which Triton launches, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def rows_of(results: Tensor, plan: Plan) -> Rows:
    """Return the plan's share of ``results`` ``[N, RESULTS]``."""
    columns = [results[:, 1 + METRICS.index(name)] for name in plan.metrics]
    return Rows(results[:, 0].contiguous(), torch.stack(columns) if columns else results.new_empty(0, len(results)))
