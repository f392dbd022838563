"""What one call computes, and how tokens are cut into pieces: shared by both functions and both backends.

Legend: N tokens, V vocabulary, M metrics.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._objective import Objective

# Elements of one temporary. CPU: 2 MiB of fp32 each, seven of them, which a last-level cache holds, and few enough
# blocks for the cost of waking threads to stay small; other devices: 32 MiB each, enough to fill the device.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_ELSEWHERE = 2**23


class Plan(NamedTuple):
    """What one call computes, fixed before the first row is read."""

    objective: Objective
    metrics: tuple[str, ...]
    vocab: int  # ids that both models score
    reduction: str  # "mean", "sum" or "none"
    has_teacher: bool  # the objective or a metric reads it
    want_grad: bool


class Rows(NamedTuple):
    """Per-token results of a call, 0 where a token is ignored."""

    loss: Tensor  # [N]
    metrics: Tensor  # [M, N]

    @classmethod
    def zeros(cls, n_tokens: int, plan: Plan, dtype: torch.dtype, device: torch.device) -> "Rows":
        kwargs = {"dtype": dtype, "device": device}
        return cls(torch.zeros(n_tokens, **kwargs), torch.zeros(len(plan.metrics), n_tokens, **kwargs))

    def reduce(self, reduction: str, count: Tensor) -> tuple[Tensor, Tensor]:
        """The loss as `reduction` says and the metrics' sums ``[M]`` in fp32; `count` is 0-d."""
        loss = self.loss if reduction == "none" else self.loss.sum()
        if reduction == "mean":
            loss = loss / count.clamp(min=1)
        return loss, self.metrics.sum(-1).float()


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy labels, or positions of tokens, to `device` without waiting for it: from pageable memory the host might.

    Raises:
        ValueError: if a CUDA graph would copy these same ones again whenever it is replayed.
    """
    if not answers_at_once(tensor.device) or torch.compiler.is_compiling():
        return tensor.to(device, non_blocking=True)
    if is_capturing(device):
        raise ValueError(
            f"a CUDA graph is being captured, which would replay the labels of this batch for ever because they are on "
            f"the CPU; move them to {device} before, into a tensor that later batches are copied to"
        )
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_triton(backend: str) -> bool:
    """Whether one of the Triton backends was chosen."""
    return backend.startswith("triton")


def row_blocks(n_rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Slices of at most `rows_per_block` rows."""
    return slices(n_rows, rows_per_block(vocab, device))


def slices(n_rows: int, step: int) -> Iterator[slice]:
    """Slices of `step` rows, the last one shorter."""
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def rows_per_block(vocab: int, device: torch.device) -> int:
    return max(1, _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ELSEWHERE) // vocab)


def answers_at_once(device: torch.device) -> bool:
    """Whether reading a value of a tensor there does not make the host wait for queued work."""
    return device.type == "cpu"


def is_capturing(device: torch.device) -> bool:
    """Return whether work on `device` is being captured in a CUDA graph, where the host cannot wait for it."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
