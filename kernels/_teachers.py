"""What a loss from hidden states is measured against: the tensors of a teacher, and what they say of sizes.

Operators and autograd Functions take flat lists of tensors; :func:`teacher_of` reads one by the kind that a plan names.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, k stored ids a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Kinds of teachers: a plan names one.
HEAD, CELLS, SAMPLED = "head", "cells", "sampled"
CELL_KINDS = (CELLS, SAMPLED)


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


Teacher = tuple[TeacherHead, ...] | Cells  # () where no teacher is needed


def teacher_of(kind: str, tensors: Sequence[Tensor | None]) -> Teacher:
    """Return the teacher whose fields `tensors` are, one after another."""
    if not tensors:
        return ()
    if kind in CELL_KINDS:
        ids, log_probs, *rest = tensors
        assert ids is not None and log_probs is not None
        return Cells(ids, log_probs, *rest)
    return tuple(_head(*tensors[at : at + 4]) for at in range(0, len(tensors), 4))


def _head(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None) -> TeacherHead:
    assert hidden is not None and weight is not None
    return TeacherHead(hidden, weight, bias, scale)


def tensors_of(teacher: Teacher) -> tuple[Tensor | None, ...]:
    """Return the fields of a teacher, one after another."""
    if isinstance(teacher, Cells):
        return tuple(teacher)
    return tuple(tensor for head in teacher for tensor in head)


def scores_of(teacher: Teacher) -> list[Tensor]:
    """Return tensors of the dtypes that the teacher's scores come in, which decide on the working dtype."""
    return [teacher.log_probs] if isinstance(teacher, Cells) else [head.hidden for head in teacher]


def scored_ids(vocab: int, teacher: Teacher) -> int:
    """Return how many of the student's `vocab` leading ids both score; of stored ids those beyond are padding."""
    return vocab if isinstance(teacher, Cells) else min([vocab, *(head.vocab for head in teacher)])


def bytes_per_logit(teacher: Teacher) -> int:
    """Return the bytes of the teacher's chunk for each of its elements."""
    return 0 if isinstance(teacher, Cells) else sum(head.hidden.element_size() for head in teacher)
