"""Check what other projects say about a document, and turn it into what our caches hold.

Shapes: L tokens of a document, n of its positions, w ids that a source lists of each.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchtune_kd.caches.log_probs import NONE
from torchtune_kd.errors import UserError

SMALLEST_TAIL = 1e-3  # a smaller mass of the rest is the difference of rounded numbers
_TIMES_ERROR = 10.0  # of the sum of probabilities: a mass that is not so large is not known, either
UNLIKELY = -1000.0  # what an API writes in place of a very small log-probability lies below
_ROUNDING = 0.05  # of a sum of probabilities that were rounded to bf16


class Likeliest(NamedTuple):
    """The ids that a source lists of each position, in any order."""

    ids: np.ndarray  # [n, w] integers; NONE pads
    log_probs: np.ndarray  # [n, w] at T = 1
    error: np.ndarray | None = None  # [n] of the sum of their probabilities, at most; inf where that is not known


class Told(NamedTuple):
    """Hold what a source says about one document.

    Attributes:
        where (str): its file and row, for errors.
        documents (tuple[np.ndarray, ...]): [L] ids. Several where the source may have added a token of its own at the
            end: the first that the config's data hold is meant.
        positions (np.ndarray): [n] int64, in order; each says what follows this token.
        signal (Likeliest | Tensor): of these positions; last hidden states [n, D].
    """

    where: str
    documents: tuple[np.ndarray, ...]
    positions: np.ndarray
    signal: Any

    def rows(self, rows: np.ndarray) -> Any:
        """Return the signal of some of the positions."""
        if isinstance(self.signal, Likeliest):
            return Likeliest(*(None if part is None else part[rows] for part in self.signal))
        return self.signal[torch.from_numpy(rows)]


class TopKCoding:
    """Turn listed ids into the columns of a cache of kind ``top_k``.

    Args:
        vocab (int): ids of the models.
        smallest_tail (float): a mass of the rest below is not known.

    Attributes:
        k (int): the most likeliest ids that a position has, a label beyond them not counted.
        tokens (int): positions that were encoded.
        unknown (int): those whose mass of the rest is not known.
        fitted (int): those of which a source says log-probabilities that it fitted.
    """

    def __init__(self, vocab: int, smallest_tail: float = SMALLEST_TAIL) -> None:
        self._vocab, self._smallest = vocab, smallest_tail
        self.k = self.tokens = self.unknown = self.fitted = 0

    def __call__(self, signal: Likeliest, labels: np.ndarray, where: str) -> dict[str, Tensor]:
        """Return ``ids`` [n, k + 1] int32, ``log_probs`` [n, k + 1] fp16 and ``tail`` [n, 1] fp32.

        The likeliest id comes first. In the last column stands the label where it is not among the k likeliest.

        Args:
            signal (Likeliest): of n positions.
            labels (np.ndarray): [n] ids that follow; -1 for none.
            where (str): the source's file and row.

        Raises:
            UserError: for ids that the models have not, or what are no log-probabilities at T = 1.
        """
        ids, log_probs, counts = self._checked(signal, where)
        error = np.zeros(len(ids)) if signal.error is None else signal.error
        mass = np.exp(log_probs, where=ids != NONE, out=np.zeros_like(log_probs)).sum(-1)
        if (mass[np.isfinite(error)] > 1 + _ROUNDING).any():
            raise UserError(
                f"Expected log-probabilities at temperature 1, but at {where} those of one token sum to a probability "
                f"of {mass.max():.4g}: write the source again at temperature 1, normalised over the whole vocabulary."
            )
        known = mass < 1 - np.maximum(self._smallest, _TIMES_ERROR * error)
        tail = np.log1p(-mass, where=known, out=np.full_like(mass, np.nan))
        is_last = ids[np.arange(len(ids)), counts - 1] == labels
        k = int((counts - is_last).max())
        self.k, self.tokens, self.unknown = max(self.k, k), self.tokens + len(ids), self.unknown + int((~known).sum())
        self.fitted += int(np.isinf(error).sum())
        more = ((0, 0), (0, max(0, k + 1 - ids.shape[1])))
        ids, log_probs = np.pad(ids, more, constant_values=NONE), np.pad(log_probs, more)
        return {
            "ids": torch.from_numpy(ids.astype(np.int32)),
            "log_probs": torch.from_numpy(log_probs.astype(np.float16)),
            "tail": torch.from_numpy(tail.astype(np.float32)).unsqueeze(-1),
        }

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of the kind."""
        return {
            "kind": "top_k",
            "dtype": None,
            "k": self.k,
            "temperatures": [] if self.unknown else [1.0],
            "computed_in": "an unknown dtype",
            "width": 0,
            "vocab": self._vocab,
            "has_bias": False,
            "error": {"fitted_tokens": float(self.fitted)} if self.fitted else {},
        }

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write nothing beside the shards."""
        return {}

    def _checked(self, signal: Likeliest, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids and log-probabilities [n, w], the likeliest first, and how many each position has [n]."""
        ids, log_probs = signal.ids.astype(np.int64), signal.log_probs.astype(np.float64)
        there = ids != NONE
        if np.isnan(log_probs[there]).any():
            raise UserError(
                f"Expected log-probabilities, but one at {where} is not a number: write the source again with at most "
                "as many ids of a token as it has."
            )
        there &= log_probs > UNLIKELY  # an id without a log-probability is none
        wrong = ids[there][(ids[there] < 0) | (ids[there] >= self._vocab)]
        if len(wrong):
            raise UserError(
                f"Expected ids below the models' {self._vocab}, but one at {where} is {wrong[0]}: name the config of "
                "models that share the teacher's tokenizer."
            )
        exact = there if signal.error is None else there & np.isfinite(signal.error)[:, None]
        if exact.any() and log_probs[exact].max() > SMALLEST_TAIL:
            raise UserError(
                f"Expected log-probabilities, which are at most 0, but one at {where} is "
                f"{log_probs[exact].max():.4g}: write the source again with log-probabilities in place of logits."
            )
        counts = there.sum(-1)
        if not counts.all():
            raise UserError(
                f"Expected an id with a log-probability for every token, but one at {where} has none: write the source "
                "again with at least one of each token."
            )
        order = np.argsort(np.where(there, -log_probs, np.inf), axis=-1, kind="stable")[:, : counts.max()]
        ids = np.take_along_axis(np.where(there, ids, NONE), order, -1)
        log_probs = np.take_along_axis(np.where(there, log_probs, 0.0), order, -1)
        in_order = np.sort(ids, -1)
        twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NONE)
        if twice.any():
            raise UserError(
                f"Expected different ids of a token, but {in_order[:, 1:][twice][0]} stands twice at {where}: write "
                "the source again."
            )
        return ids, log_probs, counts
