"""The logits of a chunk of tokens, which is all that exists of them at a time.

Legend: N tokens, n visited tokens, C tokens of a chunk, V vocabulary, D hidden width of the model at hand.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._float8 import Float8Product, padded
from ._plan import chunk_size, row_blocks
from ._teachers import LOGITS, Cells, Mixture, Teacher, TeacherHead, bytes_per_logit, mixed_dtype


class Models(NamedTuple):
    """Hold both models as the loss sees them: the factors of the student's logits, and the teacher."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V', D], V' >= plan.vocab
    bias: Tensor | None  # [V']
    teacher: Teacher = None  # where it is not needed


class StudentChunks:
    """Make the student's logits of chunks of tokens, one after another in the same memory.

    Args:
        models (Models): factors of the logits.
        vocab (int): V, ids that both models score.
        size (int): the largest chunk.

    Attributes:
        weight (Tensor): ``[V, D]`` of the student.
    """

    def __init__(self, models: Models, vocab: int, size: int) -> None:
        self.weight, self._bias = models.weight[:vocab], _cut(models.bias, vocab)
        self._memory = _buffer(models.hidden, size, vocab)

    def fill(self, hidden: Tensor) -> Tensor:
        """Compute a chunk's logits ``[C, V]`` from its hidden states ``[C, D]``."""
        return _logits(hidden, self.weight, self._bias, self._memory[: len(hidden), : len(self.weight)])


class TeacherChunks(Protocol):
    """Hand the loss arithmetic a teacher, chunk by chunk."""

    def fill(self, pick: "slice | Tensor") -> None:
        """Make the chunk of the tokens `pick` of the N."""
        ...

    def rows(self, block: slice, where: slice) -> "Tensor | Cells | None":
        """Return what the loss arithmetic of some rows reads.

        Args:
            block (slice): the rows, counted from the chunk's first.
            where (slice): the rows, counted from the first of the n visited tokens.
        """
        ...


def teacher_chunks(models: Models, vocab: int, size: int) -> TeacherChunks:
    """Return what makes the chunks of the teacher; the arguments are those of `StudentChunks`."""
    teacher = models.teacher
    if isinstance(teacher, Cells):
        return CellRows(teacher)
    if isinstance(teacher, Mixture):
        return (LogitMixture if teacher.of == LOGITS else ProbabilityMixture)(teacher, vocab, size)
    return NoTeacher() if teacher is None else HeadChunks(teacher, vocab, size)


class NoTeacher:
    """Stand for a teacher that is not needed."""

    def fill(self, pick: "slice | Tensor") -> None: ...

    def rows(self, block: slice, where: slice) -> None: ...


class CellRows:
    """Cut stored ids, which are those of the visited tokens, into blocks."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    def fill(self, pick: "slice | Tensor") -> None: ...

    def rows(self, block: slice, where: slice) -> Cells:
        return self._cells.rows(where)


class HeadChunks:
    """Make the logits of one teacher, in the same memory for every chunk.

    Args:
        head (TeacherHead): its factors.
        vocab (int): V, ids that all models score.
        size (int): the largest chunk.
        memory (Tensor | None): ``[size, V']`` to write to, of the dtype of the hidden states; None allocates it.
    """

    def __init__(self, head: TeacherHead, vocab: int, size: int, memory: Tensor | None = None) -> None:
        self._hidden, self._weight, self._bias = head.hidden, head.weight[:vocab], _cut(head.bias, vocab)
        self._memory = _buffer(head.hidden, size, vocab) if memory is None else memory
        self._vocab, self._float8 = vocab, None
        if head.scale is not None:
            self._float8 = Float8Product(head.weight, head.scale, self._bias, vocab, head.hidden.dtype)
        self.chunk = self._memory

    def fill(self, pick: "slice | Tensor") -> None:
        hidden = self._hidden[pick]
        rows = self._memory[: len(hidden)]
        self.chunk = rows[:, : self._vocab]
        if self._float8 is None:
            _logits(hidden, self._weight, self._bias, self.chunk)
        else:
            self._float8(hidden, rows)

    def rows(self, block: slice, where: slice) -> Tensor:
        return self.chunk[block]


class LogitMixture:
    """Make the weighted sum of the members' logits, Σ w·z: that of one head over all hidden states side by side."""

    def __init__(self, mixture: Mixture, vocab: int, size: int) -> None:
        self._heads, self._shares, self._vocab = mixture.heads, mixture.shares, vocab
        first = mixture.heads[0].hidden
        self._memory = _buffer(first, size, vocab)
        self._chunk = self._memory
        biases = [(head.bias, share) for head, share in zip(*mixture[:2], strict=True) if head.bias is not None]
        self._bias = None
        if biases:
            parts = [bias[:vocab].to(mixed_dtype(mixture.heads)) * share for bias, share in biases]
            self._bias = torch.stack(parts).sum(0).to(first.dtype)

    def fill(self, pick: "slice | Tensor") -> None:
        for at, (head, share) in enumerate(zip(self._heads, self._shares, strict=True)):
            hidden = head.hidden[pick]
            self._chunk = self._memory[: len(hidden), : self._vocab]
            so_far = self._bias if at == 0 else self._chunk
            beta = 1 if so_far is not None else 0  # 0 reads nothing of what a buffer holds
            factors = hidden, head.weight[: self._vocab].t()
            torch.addmm(self._chunk if so_far is None else so_far, *factors, beta=beta, alpha=share, out=self._chunk)

    def rows(self, block: slice, where: slice) -> Tensor:
        return self._chunk[block]


class ProbabilityMixture:
    """Make the logits of the mean of the members' distributions, log Σ w·softmax(z), in fp32 or fp64.

    Each member's logits are made in the same memory and added while the next one is not there yet.
    """

    def __init__(self, mixture: Mixture, vocab: int, size: int) -> None:
        first = mixture.heads[0].hidden
        scratch = _buffer(first, size, vocab)
        self._members = [HeadChunks(head, vocab, size, scratch) for head in mixture.heads]
        self._shares, self._vocab = mixture.shares, vocab
        self._memory = torch.empty_like(scratch, dtype=mixed_dtype(mixture.heads))
        self._chunk = self._memory

    def fill(self, pick: "slice | Tensor") -> None:
        for at, (member, share) in enumerate(zip(self._members, self._shares, strict=True)):
            member.fill(pick)
            self._chunk = self._memory[: len(member.chunk), : self._vocab]
            for rows in row_blocks(len(self._chunk), self._vocab, self._chunk.device):
                log_probs = member.chunk[rows].to(self._chunk.dtype, copy=True)
                log_probs.sub_(log_probs.logsumexp(-1, keepdim=True)).add_(math.log(share))
                into = self._chunk[rows]
                if at == 0:
                    into.copy_(log_probs)
                else:
                    torch.logaddexp(into, log_probs, out=into)

    def rows(self, block: slice, where: slice) -> Tensor:
        return self._chunk[block]


def chunk_tokens_of(models: Models, vocab: int, chunk_tokens: int | None, n_tokens: int) -> int:
    """Return the chunk size asked for, or the one chosen for `n_tokens`."""
    if chunk_tokens is not None:
        return chunk_tokens
    element_bytes = models.hidden.element_size() + bytes_per_logit(models.teacher)
    return chunk_size(n_tokens, vocab, element_bytes, models.hidden.device)


def one_chunk(models: Models, vocab: int, chunk_tokens: int | None) -> bool:
    """Return whether one chunk holds all N tokens, valid or not, which is known without their labels."""
    n_tokens = models.hidden.shape[0]
    return chunk_tokens_of(models, vocab, chunk_tokens, n_tokens) >= n_tokens


def _cut(bias: Tensor | None, vocab: int) -> Tensor | None:
    return None if bias is None else bias[:vocab]


def _buffer(like: Tensor, size: int, vocab: int) -> Tensor:
    return like.new_empty(size, padded(vocab))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Compute hidden @ weight.T (+ bias) ``[C, V]``."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)
