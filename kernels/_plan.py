"""What one call computes, and how tokens are cut into pieces: shared by both functions and both backends.

Legend: N tokens, n valid tokens, V vocabulary, M metrics.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._meta import stands_for
from ._objective import Objective

# Elements of one temporary. CPU: 2 MiB of fp32 each, seven of them, which a last-level cache holds, and few enough
# blocks for the cost of waking threads to stay small; other devices: 32 MiB each, enough to fill the device.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_ELSEWHERE = 2**23

# Bytes of both models' chunks of logits. CPU: matrix products are at full speed from about 512 tokens on.
# Elsewhere: 2048 tokens of a 128256-word vocabulary in bf16.
_CHUNK_BYTES = {"cpu": 2**28}
_CHUNK_BYTES_ELSEWHERE = 2**30


class Plan(NamedTuple):
    """Say what one call computes, fixed before the first row is read."""

    objective: Objective
    metrics: tuple[str, ...]
    vocab: int  # ids that both models score
    reduction: str  # "mean", "sum" or "none"
    has_teacher: bool  # the objective or a metric reads it
    want_grad: bool
    scale: float = 1.0  # of the loss and its gradient, not of the metrics
    teacher_kind: str = "head"  # how ``_teachers.py`` reads the teacher's tensors
    shares: tuple[float, ...] = ()  # of an ensemble's members


class Rows(NamedTuple):
    """Hold the results of a call for every token, 0 where it is ignored."""

    loss: Tensor  # [N]
    metrics: Tensor  # [M, N]

    @classmethod
    def zeros(cls, n_tokens: int, plan: Plan, dtype: torch.dtype, device: torch.device) -> "Rows":
        """Return the results of tokens that are all ignored, to be filled with those of others."""
        kwargs = {"dtype": dtype, "device": device}
        return cls(torch.zeros(n_tokens, **kwargs), torch.zeros(len(plan.metrics), n_tokens, **kwargs))

    def reduce(self, reduction: str, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss as `reduction` says and the metrics' sums ``[M]`` in fp32; `count` is 0-d."""
        loss = self.loss if reduction == "none" else self.loss.sum()
        if reduction == "mean":
            loss = loss / count.clamp(min=1)
        return loss, self.metrics.sum(-1).float()


class Tokens(NamedTuple):
    """Hold the tokens to work through."""

    index: Tensor | None  # [n], their positions among the N; None if all N are visited
    labels: Tensor  # [n]
    count: Tensor  # 0-d, number of valid ones


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy labels, or positions of tokens, to `device` without waiting for it: from pageable memory the host might.

    Raises:
        ValueError: if a CUDA graph would copy these same ones again whenever it is replayed.
    """
    if not host_can_read(tensor.device) or torch.compiler.is_compiling():
        return tensor.to(device, non_blocking=True)
    if is_capturing(device):
        raise ValueError(
            f"a CUDA graph is being captured, which would replay the labels of this batch for ever because they are on "
            f"the CPU; move them to {device} before, into a tensor that later batches are copied to"
        )
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def valid_tokens(labels: Tensor, ignore_index: int, device: torch.device, backend: str) -> Tokens:
    """Return the valid tokens, on `device`.

    With labels on a device the host waits once, for the number of valid ones: they take a small part of the time that
    the products of ignored tokens would. Where it cannot wait, in a CUDA graph that is being captured, and where there
    are no values, with labels on the meta device, all tokens are visited, and the kernel gives ignored ones zeros.
    """
    if labels.is_meta or (is_capturing(device) and not host_can_read(labels.device)):
        if backend == "torch":
            raise ValueError(
                f"backend={backend!r} has to wait for the number of valid tokens, which a CUDA graph that is being "
                f"captured cannot do; use backend='triton' or leave linear_kd_loss out of the graph"
            )
        labels = labels.to(device, non_blocking=True)
        return Tokens(None, labels, (labels != ignore_index).sum())
    index = (labels != ignore_index).nonzero().squeeze(-1)
    count = torch.full((), len(index), device=device)
    if len(index) == len(labels):
        return Tokens(None, to_device(labels, device), count)
    return Tokens(to_device(index, device), to_device(labels[index], device), count)


def row_blocks(n_rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into slices of at most `rows_per_block`."""
    return slices(n_rows, rows_per_block(vocab, device))


def slices(n_rows: int, step: int) -> Iterator[slice]:
    """Cut rows into slices of `step`, the last one shorter."""
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def rows_per_block(vocab: int, device: torch.device) -> int:
    """Return how many rows of `vocab` elements a temporary holds."""
    return max(1, _BLOCK_ELEMENTS.get(stands_for(device).type, _BLOCK_ELEMENTS_ELSEWHERE) // vocab)


def chunk_size(n_tokens: int, vocab: int, element_bytes: int, device: torch.device) -> int:
    """Return the tokens per chunk: as few equal chunks as the byte budget allows, in multiples of 128 tokens."""
    budget = _CHUNK_BYTES.get(stands_for(device).type, _CHUNK_BYTES_ELSEWHERE)
    most = max(128, budget // (vocab * element_bytes) // 128 * 128)
    n_chunks = -(-n_tokens // most)
    return min(most, -(-n_tokens // max(1, n_chunks) // 128) * 128) or 128


def autocast_type(device: torch.device) -> str:
    """Return the type of device whose autocast has to do with tensors on `device`; the meta device has none."""
    return "cpu" if device.type == "meta" else device.type


def host_can_read(device: torch.device) -> bool:
    """Return whether the host can read a value of a tensor on `device` without waiting for queued work."""
    return device.type == "cpu"


def is_capturing(device: torch.device) -> bool:
    """Return whether work on `device` is being captured in a CUDA graph, where the host cannot wait for it."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
