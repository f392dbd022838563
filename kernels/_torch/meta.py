"""The loss arithmetic on meta tensors: memory without values.

Legend: C tokens of a chunk, V vocabulary, k stored ids a token.
"""

import torch
from torch import Tensor

from .._meta import account, stands_for
from .._plan import Plan, rows_per_block
from .._teachers import CELL_KINDS, Cells
from .block import BlockLoss
from .cells import CellsBlockLoss

# Numbers held at a time for each cell, at most: with all metrics at T ≠ 1. A test compares with real calls.
CELL_NUMBERS = 14


class MetaBlockLoss:
    """Allocate what the arithmetic on chunks of logits would: PyTorch's workspace, or with Triton what cells take.

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
            kind = CellsBlockLoss if plan.teacher_kind in CELL_KINDS else BlockLoss
            self._workspace = kind(plan, rows, dtype, device)

    def __call__(self, student: Tensor, teacher: Tensor | Cells | None, *_: object) -> tuple[Tensor, list[Tensor]]:
        """Allocate the results of one chunk ``[C, V]``, and account for the bytes that it would move."""
        # README.md: the kernel reads each model's logits twice and writes the gradient once; in PyTorch they pass
        # through some twenty operations in fp32 that stay in a CPU's cache
        read = (student, *(teacher if isinstance(teacher, Cells) else (teacher,)))
        logits = sum(tensor.nbytes for tensor in read if tensor is not None)
        account(2 * logits + student.nbytes)
        if isinstance(teacher, Cells) and self._workspace is None:
            rows, k = teacher.ids.shape
            student.new_empty(CELL_NUMBERS, rows, k + 1, dtype=self._dtype)  # freed at once
        rows = [student.new_empty(len(student), dtype=self._dtype) for _ in range(1 + len(self._plan.metrics))]
        return rows[0], rows[1:]

    def release(self) -> None:
        """Free the workspace."""
        self._workspace = None


def uses_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device that the meta device stands for has a Triton kernel compute whole chunks."""
    return stands_for(device).type == "cuda" and dtype != torch.float64
