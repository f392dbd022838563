"""Memory that one call on the CPU leaves to the next: to map it anew takes longer than to compute in it."""

import contextlib

import torch
from torch import Tensor


class Workspaces:
    """What is kept: little, in fp32, on the CPU.

    Attributes:
        largest (int): bytes of one that is kept.
        most (int): how many are: calls at the same time from several threads have one each.
    """

    def __init__(self, largest: int = 2**25, most: int = 2) -> None:
        self.largest, self.most = largest, most
        self.spare: list[Tensor] = []

    def take(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At least as many elements, flat, whatever is in them."""
        with torch.inference_mode(False):  # else the next call could not write to them
            if _is_kept(dtype, device):
                with contextlib.suppress(IndexError):  # none is there, or another thread was faster
                    memory = self.spare.pop()
                    if memory.numel() >= elements:
                        return memory
            return torch.empty(elements, dtype=dtype, device=device)

    def give_back(self, memory: Tensor) -> None:
        """`memory` of :meth:`take` is free for the next call."""
        if _is_kept(memory.dtype, memory.device) and memory.nbytes <= self.largest and len(self.spare) < self.most:
            self.spare.append(memory)


def _is_kept(dtype: torch.dtype, device: torch.device) -> bool:
    # tensors that stand for others, as in a trace, are not mixed with these
    return device.type == "cpu" and dtype == torch.float32 and type(torch.empty(0)) is Tensor


# of softmax_kd_loss; beside the matrix products of linear_kd_loss mapping memory is nothing
WORKSPACES = Workspaces()
