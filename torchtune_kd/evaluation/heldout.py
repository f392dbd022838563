"""Distances on held-out text: next-token loss, KL to a reference, agreement, acceptance.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from torchtune_kd.data.batches import Batch
from torchtune_kd.evaluation.candidates import Candidate
from torchtune_kd.evaluation.measured import Measured, over_items
from torchtune_kd.kernels import Objective, linear_kd_objective
from torchtune_kd.reports import statistics

ALONE = ("class_loss", "student_entropy")
DISTANCES = ("kl", "top1_agreement", "acceptance_rate")
_NAMES = {"class_loss": "loss", "student_entropy": "entropy"}
_OBJECTIVE = Objective(kd_ratio=0.0)  # its cross-entropy is not used: metrics alone are


@torch.inference_mode()
def measure_text(candidate: Candidate, reference: Candidate | None, batches: Iterable[Batch]) -> list[Measured]:
    """Measure a model on text, alone and against a reference.

    Every row is an item: its mean over valid tokens, which count as its weight. Errors are therefore clustered by
    row, as tokens of one text are not independent.

    Args:
        candidate (Candidate): the model.
        reference (Candidate | None): p of KL(p ‖ q), q being the model; None measures the model alone.
        batches (Iterable[Batch]): the text.

    Returns:
        list[Measured]: loss, perplexity (with the error that follows from the loss's), entropy, and the distances.
    """
    rows: list[list[float]] = []
    names = [*ALONE, *(DISTANCES if reference is not None else ())]
    for batch in batches:
        states = candidate.states(batch.tokens, **batch.attention)
        other = None if reference is None else reference.states(batch.tokens, **batch.attention)
        for index, labels in enumerate(batch.labels):
            row = _sums(candidate, reference, states[index], None if other is None else other[index], labels, names)
            tokens = row["num_tokens"]
            if tokens:
                rows.append([tokens, *(row[name] / tokens for name in names)])
    weights = [row[0] for row in rows]
    measured = [
        over_items(_NAMES.get(name, name), [row[index] for row in rows], weights)
        for index, name in enumerate(names, start=1)
    ]
    return [*measured, _perplexity(measured[0])]


def _sums(
    candidate: Candidate,
    reference: Candidate | None,
    states: Tensor,
    other: Tensor | None,
    labels: Tensor,
    names: list[str],
) -> dict[str, float]:
    """Sum the metrics over the valid tokens of one row, with states [S, D] and labels [S]."""
    weight, bias = candidate.head
    teacher_weight, teacher_bias = (None, None) if reference is None else reference.head
    _, sums = linear_kd_objective(
        states,
        weight,
        other,
        teacher_weight,
        labels,
        _OBJECTIVE,
        student_bias=bias,
        teacher_bias=teacher_bias,
        reduction="sum",
        return_metrics=names,
    )
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def _perplexity(loss: Measured) -> Measured:
    """Return exp of the loss, with the error of the loss times it (the delta method)."""
    value = statistics.perplexity(loss.value)
    return Measured("perplexity", value, None if loss.se is None else loss.se * value, loss.n)


def text_fingerprint(batches: Iterable[Batch]) -> str:
    """Return a fingerprint of the rows: their ids and which of them count, whatever the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
            last = max((place for place, label in enumerate(labels) if label >= 0), default=-1)  # the rest is padding
            digest.update(repr((tokens[: last + 1], labels[: last + 1])).encode())
    return digest.hexdigest()[:16]
