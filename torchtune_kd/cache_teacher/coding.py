"""From the teacher's last hidden states to what is stored of a token, by kind.

Shapes: m tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchtune_kd.cache_teacher.documents import Listed
from torchtune_kd.caches import log_probs, states
from torchtune_kd.losses.signals import Head

_ROWS = 512  # of logits that are there at once
Columns = dict[str, Tensor]


class Coding(Protocol):
    """Turn states into columns."""

    def __call__(self, hidden: Tensor, labels: Tensor, documents: Sequence[Listed]) -> Columns:
        """Return the columns of tokens.

        Args:
            hidden (Tensor): [m, D] of the documents' stored positions, one document after the other.
            labels (Tensor): [m] ids that follow these tokens; -1 at the end of a document.
            documents (Sequence[Listed]): whose they are.
        """
        ...


class HiddenStates:
    """Store the states themselves.

    Args:
        dtype (str): "fp32", "bf16", "fp16" or "int8".
        rms (Tensor): [D] root mean squares of the channels.
    """

    def __init__(self, dtype: str, rms: Tensor) -> None:
        self._dtype, self._rms = dtype, rms

    def __call__(self, hidden: Tensor, labels: Tensor, documents: Sequence[Listed]) -> Columns:
        """Return the columns of :func:`torchtune_kd.caches.states.encode`."""
        return states.encode(hidden, self._dtype, self._rms)


class TopK:
    """Store the likeliest ids, and the mass of the rest.

    Args:
        head (Callable[[], Head]): returns the teacher's head, whole after its forward.
        k (int): how many.
        temperatures (Sequence[float]): at which the mass is stored.
    """

    def __init__(self, head: Callable[[], Head], k: int, temperatures: Sequence[float]) -> None:
        self._head, self._k, self._temperatures = head, k, temperatures

    def __call__(self, hidden: Tensor, labels: Tensor, documents: Sequence[Listed]) -> Columns:
        """Return the columns of :func:`torchtune_kd.caches.log_probs.encode_top_k`."""
        return _joined(
            log_probs.encode_top_k(logits, labels[rows], self._k, self._temperatures)
            for rows, logits in _logits(hidden, self._head())
        )


class Drawn:
    """Store ids drawn from the teacher, for each document with a generator that its key seeds.

    Args:
        head (Callable[[], Head]): returns the teacher's head, whole after its forward.
        samples (int): how many.
    """

    def __init__(self, head: Callable[[], Head], samples: int) -> None:
        self._head, self._samples = head, samples

    def __call__(self, hidden: Tensor, labels: Tensor, documents: Sequence[Listed]) -> Columns:
        """Return the columns of :func:`torchtune_kd.caches.log_probs.encode_sampled`."""
        head, begin, found = self._head(), 0, []
        for document in documents:
            generator = torch.Generator(hidden.device).manual_seed(int.from_bytes(document.key[:8], "little") >> 1)
            end = begin + len(document.positions)
            for _, logits in _logits(hidden[begin:end], head):
                found.append(log_probs.encode_sampled(logits, self._samples, generator))
            begin = end
        if not found:  # a batch that keeps other processes company
            return log_probs.encode_sampled(hidden.new_zeros(0, 1), self._samples, torch.Generator(hidden.device))
        return log_probs.trimmed(_joined(found))


@torch.no_grad()
def _logits(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yield logits [at most _ROWS, V] with their rows, in the states' dtype; once at least."""
    for begin in range(0, max(len(hidden), 1), _ROWS):
        rows = slice(begin, begin + _ROWS)
        yield rows, torch.nn.functional.linear(hidden[rows], head.weight, head.bias)


def _joined(parts: Iterator[Columns] | Sequence[Mapping[str, Tensor]]) -> Columns:
    whole = list(parts)
    return {name: torch.cat([part[name] for part in whole]) for name in whole[0]}
