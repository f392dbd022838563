"""A rounding to e4m3, and the logits of a teacher's head in 8 bits, that share no code with the kernels.

Legend: N tokens, V vocabulary, D hidden width of the teacher.
"""

import torch

from helpers.grid_checks import make_inputs
from torchtune_kd.kernels import float8_weight

FLOAT8 = torch.float8_e4m3fn
D = 48


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round fp64 numbers of at most 448 to 4 significant bits, or below 2^-6 to multiples of 2^-9, ties to even."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return torch.round(x / step) * step


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return what is left of rows ``[N, D]`` in 8 bits with a scale each, in fp64."""
    x = x.detach().float()
    scale = (x.abs().amax(-1, keepdim=True) * (1 / 448)).double()  # the product in fp32: another one moves ties
    return torch.where(scale > 0, e4m3(x.double() / scale.clamp(min=1e-300)) * scale, 0.0)


def inputs_of(dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, torch.Tensor]:
    return make_inputs(**{"teacher_d": D, "dtype": dtype, **sizes})


def teacher_logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the rounded numbers, themselves rounded once."""
    z = rounded(inputs["teacher_hidden"]) @ rounded(inputs["teacher_weight"]).t()
    if inputs["teacher_bias"] is not None:
        z += inputs["teacher_bias"].double()
    return z.to(inputs["teacher_hidden"].dtype).double()


def quantised(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**inputs, "teacher_weight": float8_weight(inputs["teacher_weight"])}
