"""The loss arithmetic on meta tensors: memory without values.

Legend: C tokens of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from .._meta import account, stands_for
from .._plan import Plan, rows_per_block
from .block import BlockLoss


class MetaBlockLoss:
    """Allocate what the arithmetic on chunks of logits would: ``BlockLoss``'s workspace, or with Triton none.

    Args:
        plan (Plan): what would be computed.
        max_rows (int): the largest chunk that will come.
        dtype (torch.dtype): working dtype, fp32 or fp64.
    """

    def __init__(self, plan: Plan, max_rows: int, dtype: torch.dtype) -> None:
        device = torch.device("meta")
        self._plan, self._dtype, self._workspace = plan, dtype, None
        if not uses_kernel(device, dtype):
            rows = min(max_rows, rows_per_block(plan.vocab, device))
            self._workspace = BlockLoss(plan, rows, dtype, device)

    def __call__(self, student: Tensor, teacher: Tensor | None, *_: object) -> tuple[Tensor, list[Tensor]]:
        """Allocate the results of one chunk ``[C, V]``, and account for the bytes that it would move."""
        # README.md: the kernel reads each model's logits twice and writes the gradient once; in PyTorch they pass
        # through some twenty operations in fp32 that stay in a CPU's cache
        logits = sum(tensor.nbytes for tensor in (student, teacher) if tensor is not None)
        account(2 * logits + student.nbytes)
        rows = [student.new_empty(len(student), dtype=self._dtype) for _ in range(1 + len(self._plan.metrics))]
        return rows[0], rows[1:]

    def release(self) -> None:
        """Free the workspace."""
        self._workspace = None


def uses_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device that the meta device stands for has a Triton kernel compute whole chunks."""
    return stands_for(device).type == "cuda" and dtype != torch.float64
