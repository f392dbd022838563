"""Gradient of an output head, summed over chunks of tokens.

Legend: C tokens of a chunk, V vocabulary, V' >= V rows of the head, D hidden width.
"""

import torch
from torch import Tensor

from .._meta import stands_for
from .._plan import row_blocks


def head_gradient_dtype(dtype: torch.dtype, single: bool) -> torch.dtype:
    """Return the dtype of the sum: fp32 (fp64) over chunks; one product in bf16 is rounded once anyway."""
    keep = dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and single)
    return dtype if keep else torch.float32


def _adds_in_fp32(device: torch.device) -> bool:
    """Return whether `device`, or what it stands for, multiplies half-precision matrices into an fp32 sum."""
    return stands_for(device).type == "cuda" and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype_out")


class HeadGradient:
    """Sum gradient.T @ hidden ``[V', D]`` over chunks, in fp32 (fp64) if there may be two chunks.

    On CUDA the product of bf16 or fp16 factors is added to the fp32 sum as it is. Elsewhere, and in PyTorch that has no
    such product, it has the dtype of its factors: in bf16 each chunk's is rounded before it is added, and in fp16,
    where even a chunk's sum over tokens soon leaves the range, the factors are made fp32.
    """

    def __init__(self, weight: Tensor, vocab: int, single: bool) -> None:
        self._weight, self._vocab = weight, vocab
        self._sum = torch.empty_like(weight, dtype=head_gradient_dtype(weight.dtype, single))
        self._sum[vocab:] = 0
        self._is_empty = True
        self._product: Tensor | None = None
        self._adds_in_fp32 = _adds_in_fp32(weight.device)

    @property
    def sum(self) -> Tensor:
        """The sum so far ``[V', D]``."""
        return self._sum.zero_() if self._is_empty else self._sum

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """Add one chunk: gradient ``[C, V]``, hidden states ``[C, D]``."""
        own, beta = self._weight.dtype, 0 if self._is_empty else 1
        self._is_empty = False
        into = self._sum[: self._vocab]
        if into.dtype == own:
            into.addmm_(grad.t(), hidden, beta=beta)
        elif self._adds_in_fp32:
            if beta and not grad.is_meta:  # where there are no values, either call makes none
                torch.addmm(into, grad.t(), hidden, out_dtype=torch.float32, out=into)
            else:
                torch.mm(grad.t(), hidden, out_dtype=torch.float32, out=into)
        elif own == torch.float16:
            hidden = hidden.float()
            for rows in row_blocks(self._vocab, len(grad), grad.device):
                into[rows].addmm_(grad[:, rows].t().float(), hidden, beta=beta)
        else:
            if self._product is None:
                self._product = grad.new_empty(self._vocab, hidden.shape[1])
            torch.mm(grad.t(), hidden, out=self._product)
            # block by block, because on a CPU adding bf16 to fp32 makes an fp32 copy of its operand
            for rows in row_blocks(self._vocab, hidden.shape[1], grad.device):
                if beta:
                    into[rows] += self._product[rows]
                else:
                    into[rows] = self._product[rows]
