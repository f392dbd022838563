"""Memory that one call on the CPU leaves to the next: to map it anew takes longer than to compute in it."""

import contextlib

import torch
from torch import Tensor


class Workspaces:
    """Keep memory between calls: little, in fp32, on the CPU.

    Attributes:
        largest (int): most bytes of a workspace that is kept.
        most (int): how many are kept, because calls at the same time from several threads have one each.
    """

    def __init__(self, largest: int = 2**25, most: int = 2) -> None:
        self.largest, self.most = largest, most
        self.spare: list[Tensor] = []

    def take(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of at least as many elements, flat and not initialised."""
        with torch.inference_mode(False):  # else the next call could not write to them
            if _is_kept(dtype, device):
                with contextlib.suppress(IndexError):  # none is there, or another thread was faster
                    memory = self.spare.pop()
                    if memory.numel() >= elements:
                        return memory
            return torch.empty(elements, dtype=dtype, device=device)

    def give_back(self, memory: Tensor) -> None:
        """Leave `memory` of :meth:`take` to the next call."""
        if _is_kept(memory.dtype, memory.device) and memory.nbytes <= self.largest and len(self.spare) < self.most:
            self.spare.append(memory)


def _is_kept(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether such memory is kept at all."""
    # tensors that stand for others, as in a trace, are not mixed with these
    return device.type == "cpu" and dtype == torch.float32 and type(torch.empty(0)) is Tensor


# softmax_kd_loss takes its memory here. Beside the matrix products of linear_kd_loss mapping memory costs nothing.
WORKSPACES = Workspaces()
