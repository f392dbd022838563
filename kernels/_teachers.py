"""Hold the tensors of a teacher that a loss from hidden states is measured against, and what they say of sizes.

Operators and autograd Functions take flat lists of tensors; :func:`teacher_of` reads one by the kind that a plan names.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, k stored ids a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._plan import working_dtype

# Kinds of teachers: a plan names one. Those of ensembles are what is averaged.
HEAD, CELLS, SAMPLED, PROBABILITIES, LOGITS = "head", "cells", "sampled", "probabilities", "logits"
CELL_KINDS = (CELLS, SAMPLED)
MIXES = (PROBABILITIES, LOGITS)


class TeacherHead(NamedTuple):
    """Hold the factors of a teacher's logits."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V', D], V' >= the ids that both models score
    bias: Tensor | None  # [V']
    scale: Tensor | None = None  # [V'], of a weight in 8-bit floats

    @property
    def vocab(self) -> int:
        """Number of ids that it scores; a weight in 8-bit floats has more rows than ids."""
        return (self.weight if self.scale is None else self.scale).shape[0]


class Mixture(NamedTuple):
    """Hold an ensemble of teachers, whose widths and paddings of the vocabulary may differ."""

    heads: tuple[TeacherHead, ...]
    shares: tuple[float, ...]  # of each, above 0, that add up to 1
    of: str  # one of MIXES


class Cells(NamedTuple):
    """Hold a teacher's likeliest ids, or ids drawn from it, of the valid tokens in the order of the batch."""

    ids: Tensor  # [n, k] integers, -1 pads
    log_probs: Tensor  # [n, k] at T = 1, of all ids; of drawn ones log(count/number of draws)
    tail: Tensor | None  # [n] log Σ exp(log_prob/T) over the ids that are not stored
    tail_at_1: Tensor | None  # [n] the same at T = 1
    entropy: Tensor | None  # [n] of the whole distribution at T = 1

    def rows(self, where: slice) -> "Cells":
        """Return those of some tokens."""
        rest = (None if tensor is None else tensor[where] for tensor in self[2:])
        return Cells(self.ids[where], self.log_probs[where], *rest)


Teacher = TeacherHead | Mixture | Cells | None  # None where no teacher is needed


def heads_of(teacher: Teacher) -> tuple[TeacherHead, ...]:
    """Return the heads that logits are made of: none of stored ids."""
    if isinstance(teacher, Mixture):
        return teacher.heads
    return (teacher,) if isinstance(teacher, TeacherHead) else ()


def teacher_of(kind: str, shares: tuple[float, ...], tensors: Sequence[Tensor | None]) -> Teacher:
    """Return the teacher whose fields `tensors` are, one after another.

    Args:
        kind (str): of the teacher.
        shares (tuple[float, ...]): of an ensemble's members.
        tensors (Sequence[Tensor | None]): what :func:`tensors_of` returned.
    """
    if not tensors:
        return None
    if kind in CELL_KINDS:
        ids, log_probs, *rest = tensors
        assert ids is not None and log_probs is not None
        return Cells(ids, log_probs, *rest)
    heads = tuple(_head(*tensors[at : at + 4]) for at in range(0, len(tensors), 4))
    return heads[0] if kind == HEAD else Mixture(heads, shares, kind)


def _head(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None) -> TeacherHead:
    assert hidden is not None and weight is not None
    return TeacherHead(hidden, weight, bias, scale)


def tensors_of(teacher: Teacher) -> tuple[Tensor | None, ...]:
    """Return the tensors of a teacher, one after another."""
    if isinstance(teacher, Cells):
        return tuple(teacher)
    return tuple(tensor for head in heads_of(teacher) for tensor in head)


def scores_of(teacher: Teacher) -> list[Tensor]:
    """Return tensors of the dtypes that the teacher's scores come in, which decide on the working dtype."""
    return [teacher.log_probs] if isinstance(teacher, Cells) else [head.hidden for head in heads_of(teacher)]


def scored_ids(vocab: int, teacher: Teacher) -> int:
    """Return how many of the student's `vocab` leading ids all score; of stored ids those beyond are padding."""
    return min([vocab, *(head.vocab for head in heads_of(teacher))])


def bytes_per_logit(teacher: Teacher) -> int:
    """Return the bytes of the teacher's chunks for each of their elements."""
    heads = heads_of(teacher)
    if not heads:
        return 0
    mixed = isinstance(teacher, Mixture) and teacher.of == PROBABILITIES
    return heads[0].hidden.element_size() + (mixed_dtype(heads).itemsize if mixed else 0)


def mixed_dtype(heads: Sequence[TeacherHead]) -> torch.dtype:
    """Return the dtype in which probabilities of members are added up."""
    return working_dtype(*(head.hidden for head in heads))
