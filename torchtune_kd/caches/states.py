"""Hidden states as they are stored, and back.

``fp32``, ``bf16`` and ``fp16`` are rounded and nothing else. ``int8`` divides each channel by its root mean square c
over a sample of the teacher's states, then each token by a scale of its own:

    s = max_d |h_d / c_d| / 127,   stored_d = round(h_d / (c_d s)),   h'_d = c_d s stored_d

A few channels of a language model's last states carry most of their norm; without c they take the resolution of all
others, and the KL of the teacher to what comes back is some twenty times as large.

Shapes: m tokens, D hidden width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = 127


def channel_rms(states: Tensor) -> Tensor:
    """Return the root mean square of each channel [D], fp32, over states [m, D]; a channel without a value gets 1."""
    rms = states.float().square().mean(0).sqrt()
    return torch.where(rms > 0, rms, torch.ones_like(rms))


def bytes_per_token(dtype: str, width: int) -> int:
    """Return what a token's states of ``width`` channels take."""
    return width + 2 if dtype == "int8" else width * FLOATS[dtype].itemsize


def encode(states: Tensor, dtype: str, rms: Tensor) -> dict[str, Tensor]:
    """Return the columns of states [m, D]: ``states`` [m, D], and of int8 ``scale`` [m] fp16.

    Args:
        states (Tensor): of any floating dtype.
        dtype (str): "fp32", "bf16", "fp16" or "int8".
        rms (Tensor): [D], of :func:`channel_rms`; read by int8 alone.
    """
    if dtype != "int8":
        return {"states": states.to(FLOATS[dtype])}
    even = states.float() / rms
    scale = (even.abs().amax(-1) / LARGEST).to(torch.float16)
    smallest = torch.finfo(torch.float16).tiny
    steps = even / scale.float().clamp(min=smallest).unsqueeze(-1)
    return {"states": steps.round().clamp(-LARGEST, LARGEST).to(torch.int8), "scale": scale}


def decode(columns: Mapping[str, Tensor], dtype: torch.dtype, rms: Tensor) -> Tensor:
    """Return the states [m, D] of stored columns in ``dtype``.

    Args:
        columns (Mapping[str, Tensor]): of :func:`encode`.
        dtype (torch.dtype): floating.
        rms (Tensor): [D], what the states were encoded with.
    """
    states = columns["states"]
    if states.dtype != torch.int8:
        return states.to(dtype)
    return (states.float() * columns["scale"].float().unsqueeze(-1) * rms).to(dtype)
