"""Multiple choice with one pass per question: the context once, the choices side by side behind it.

Every choice sees the context and itself, at the positions that it would have alone (a tree mask), so its
log-likelihood is that of a pass of its own.

Shapes: B questions, S tokens of the longest, D hidden width, V vocabulary, n scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_kd.errors import UserError
from torchtune_kd.evaluation.candidates import Candidate

CHUNK = 1024  # tokens whose logits exist at once


class Tokenizer(Protocol):
    """List what is asked of torchtune's tokenizers."""

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]: ...


class Score(NamedTuple):
    """Hold what a model says of one choice."""

    log_likelihood: float  # nats, summed over its tokens
    is_greedy: bool  # each of its tokens is the most likely one


@dataclass(frozen=True)
class Question:
    """A question in ids.

    Attributes:
        context (Sequence[int]): what all choices have before them, at least one id.
        branches (Sequence[Sequence[int]]): the rest of each choice, at least one id.
        unscored (Sequence[int]): leading ids of each branch that belong to the context.
    """

    context: Sequence[int]
    branches: Sequence[Sequence[int]]
    unscored: Sequence[int]

    @property
    def length(self) -> int:
        """Return how many ids a pass takes; nothing is predicted from the last one of a branch."""
        return len(self.context) + sum(len(branch) - 1 for branch in self.branches)


def encode_question(tokenizer: Tokenizer, context: str, choices: Sequence[str]) -> Question:
    """Turn a context and the texts that may follow it into ids.

    Text and context are encoded together and the context's number of ids is cut off, as lm-eval does, since a
    tokenizer may join the two where they meet; white space at the context's end belongs to the choices.
    """
    stripped = context.rstrip()
    choices = [context[len(stripped) :] + choice for choice in choices]
    before = tokenizer.encode(stripped, add_bos=True, add_eos=False)
    whole = [tokenizer.encode(stripped + choice, add_bos=True, add_eos=False) for choice in choices]
    if not before:  # a tokenizer without a beginning-of-sequence id, and no context
        before = [getattr(tokenizer, "eos_id")]  # noqa: B009
        whole = [before + ids for ids in whole]
    return question_of(len(before), whole)


def question_of(context_length: int, whole: Sequence[Sequence[int]]) -> Question:
    """Find what the choices share, given each with its context of ``context_length`` ids before it."""
    if any(len(ids) <= context_length for ids in whole):
        raise UserError(
            "Expected choices that add at least one token to their question, but one adds none: remove the empty "
            "choice or the question."
        )
    if len({ids[0] for ids in whole}) != 1:
        raise UserError("Expected choices with one beginning, but their first tokens differ: give a longer question.")
    shared = 1
    while shared < context_length and len({ids[shared] for ids in whole}) == 1:
        shared += 1
    branches = [ids[shared:] for ids in whole]
    return Question(whole[0][:shared], branches, [context_length - shared] * len(whole))


@torch.inference_mode()
def score_questions(candidate: Candidate, questions: Sequence[Question], batch_size: int = 8) -> list[list[Score]]:
    """Score every choice of every question.

    Args:
        candidate (Candidate): the model.
        questions (Sequence[Question]): in any order; those of like length go through the model together.
        batch_size (int): questions of a pass.

    Returns:
        list[list[Score]]: for each question, of its choices.
    """
    parts = [part for index, whole in enumerate(questions) for part in _fitting(index, whole, candidate.max_seq_len)]
    parts.sort(key=lambda part: -part.length)
    scores: list[list[Score]] = [[] for _ in questions]
    places: list[list[int]] = [[] for _ in questions]
    for start in range(0, len(parts), batch_size):
        batch = parts[start : start + batch_size]
        for part, found in zip(batch, _score(candidate, batch), strict=True):
            scores[part.number] += found
            places[part.number] += range(part.first, part.first + len(found))
    return [
        [score for _, score in sorted(zip(place, found, strict=True))]
        for place, found in zip(places, scores, strict=True)
    ]


@dataclass(frozen=True)
class _Part(Question):
    """Some of the choices of a question."""

    number: int = 0  # of the question
    first: int = 0  # of its choices


def _fitting(number: int, question: Question, longest: int) -> Iterator[_Part]:
    """Cut a context that is too long for the model from the left, and deal the choices out over several passes."""
    most = max(len(branch) - 1 for branch in question.branches)
    if most >= longest:
        raise UserError(
            f"Expected choices of less than {longest} tokens, the most that the model takes, got {most + 1}: shorten "
            "them."
        )
    context = question.context[-(longest - most) :]
    first, used = 0, len(context)
    for index, branch in enumerate(question.branches):
        if used + len(branch) - 1 > longest:
            yield _Part(context, question.branches[first:index], question.unscored[first:index], number, first)
            first, used = index, len(context)
        used += len(branch) - 1
    yield _Part(context, question.branches[first:], question.unscored[first:], number, first)


def _score(candidate: Candidate, questions: Sequence[Question]) -> list[list[Score]]:
    length = max(question.length for question in questions)
    tokens = torch.zeros(len(questions), length, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(questions), 1, 1)  # padding sees itself
    rows: list[int] = []  # which state, counted over the batch, predicts each scored id
    ids: list[int] = []
    counts: list[int] = []
    for number, question in enumerate(questions):
        size = len(question.context)
        tokens[number, :size] = torch.tensor(question.context)
        positions[number, :size] = torch.arange(size)
        mask[number, :size, :size] = torch.ones(size, size, dtype=torch.bool).tril()
        start = size
        for branch, skipped in zip(question.branches, question.unscored, strict=True):
            end = start + len(branch) - 1
            inner = slice(start, end)
            tokens[number, inner] = torch.tensor(branch[:-1], dtype=torch.long)
            positions[number, inner] = torch.arange(size, size + end - start)
            mask[number, inner, :size] = True
            mask[number, inner, inner] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            before = [size - 1, *range(start, end)]  # of each id of the branch
            rows += [number * length + row for row in before[skipped:]]
            ids += branch[skipped:]
            counts.append(len(branch) - skipped)
            start = end
    states = candidate.states(tokens, mask=mask, input_pos=positions).flatten(0, 1)  # [B * S, D]
    log_probs, likeliest = _predictions(candidate, states[torch.tensor(rows, device=states.device)], torch.tensor(ids))
    found = [
        Score(float(part.sum()), bool(most.all()))
        for part, most in zip(log_probs.split(counts), likeliest.split(counts), strict=True)
    ]
    taken = iter(found)
    return [[next(taken) for _ in question.branches] for question in questions]


def _predictions(candidate: Candidate, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each id's log-probability from its state [n, D], on the host, and whether it is the largest."""
    weight, bias = candidate.head
    log_probs, likeliest = [], []
    for part, wanted in zip(states.split(CHUNK), ids.to(states.device).split(CHUNK), strict=True):
        logits = F.linear(part, weight, bias).float()  # [CHUNK, V]
        log_probs.append(-F.cross_entropy(logits, wanted, reduction="none").double().cpu())
        likeliest.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(log_probs), torch.cat(likeliest)
