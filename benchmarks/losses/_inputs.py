"""Inputs of a case from one seed, and the truth about them in fp64.

Legend: N tokens, V vocabulary, D hidden width, n tokens of a slice.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import Case

IGNORE = -100
SLICE = 16  # tokens whose gradient is compared with fp64
_ROWS = {"cpu": 128}  # tokens computed in fp64 at a time
_ROWS_ELSEWHERE = 512
_IDS = 8192  # rows of a head converted to fp64 at a time


class Inputs(NamedTuple):
    """`student` and `teacher` are logits ``[N, V]`` of a softmax case and hidden states ``[N, D]`` of a linear one."""

    student: Tensor
    teacher: Tensor
    student_head: Tensor | None  # [V, D]
    teacher_head: Tensor | None  # [V, D]
    labels: Tensor  # [N], on the device
    given_labels: Tensor  # the same, where the case has them


class Truth(NamedTuple):
    """Hold the exact results of one objective on one set of inputs."""

    loss: float
    teacher_entropy: float  # mean over the valid tokens, at the case's temperature
    grad: Tensor | None  # [SLICE, V] or [SLICE, D] on the CPU


def make_inputs(case: Case, device: str) -> Inputs:
    """Logits have a standard deviation of about 2; ignored tokens are spread at random."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=std, generator=generator)

    on_cpu = torch.Generator().manual_seed(0)
    labels = torch.randint(0, case.vocab, (case.tokens,), generator=on_cpu)
    labels[torch.randperm(case.tokens, generator=on_cpu)[: case.n_ignored]] = IGNORE
    there = labels.to(device)
    if case.op == "softmax":
        logits = (normal(case.tokens, case.vocab, std=2) for _ in range(2))
        return Inputs(*logits, None, None, there, there)
    hidden = [normal(case.tokens, width, std=1) for width in case.widths]
    heads = [normal(case.vocab, width, std=2 * width**-0.5) for width in case.widths]
    return Inputs(*hidden, *heads, there, there if case.labels_on_device else labels)


def fp64_truths(inputs: Inputs, cases: list[Case]) -> list[Truth]:
    """The objective of each case from its formula, a few tokens at a time.

    The cases share the inputs and whether a gradient is wanted, but may ask for less than the inputs were made for:
    where one ignores nothing, every token counts.
    """
    rows = _ROWS.get(inputs.student.device.type, _ROWS_ELSEWHERE)
    totals, entropies = [0.0] * len(cases), [0.0] * len(cases)
    for start in range(0, len(inputs.student), rows):
        piece = slice(start, start + rows)
        student, teacher = _logits(inputs, piece)
        for index, case in enumerate(cases):
            loss, entropy = _objective(student, teacher, _labels(inputs, piece, case), case)
            totals[index] += loss.item()
            entropies[index] += entropy.item()
    return [
        Truth(total / case.n_valid, entropy / case.n_valid, _gradient(inputs, case) if case.gradient else None)
        for case, total, entropy in zip(cases, totals, entropies, strict=True)
    ]


def _gradient(inputs: Inputs, case: Case) -> Tensor:
    """Return the gradient of the first tokens' logits or hidden states."""
    piece = slice(0, SLICE)
    student, teacher = _logits(inputs, piece)
    student.requires_grad_()
    loss, _ = _objective(student, teacher, _labels(inputs, piece, case), case)
    (grad,) = torch.autograd.grad(loss / case.n_valid, student)
    if inputs.student_head is not None:
        pieces = zip(grad.split(_IDS, dim=1), inputs.student_head.split(_IDS), strict=True)
        grad = sum(part @ ids.double() for part, ids in pieces)
    return grad.cpu()


def _labels(inputs: Inputs, piece: slice, case: Case) -> Tensor:
    """Labels of a slice ``[n]``; where nothing is ignored, those ignored in the inputs count with id 0."""
    labels = inputs.labels[piece]
    return labels if case.ignored else labels.clamp(min=0)


def _logits(inputs: Inputs, piece: slice) -> Iterator[Tensor]:
    """Logits of both models for some tokens ``[n, V]`` in fp64."""
    for rows, head in ((inputs.student, inputs.student_head), (inputs.teacher, inputs.teacher_head)):
        wide = rows[piece].double()
        yield wide if head is None else torch.cat([wide @ ids.double().t() for ids in head.split(_IDS)], dim=1)


def _objective(student: Tensor, teacher: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Sums over the valid tokens of the loss and of the teacher's entropy."""
    valid = labels != IGNORE
    log_p = torch.log_softmax(teacher / case.temperature, -1)
    log_q = torch.log_softmax(student / case.temperature, -1)
    loss = case.kd_ratio * case.temperature**2 * _divergence(case.divergence, log_p, log_q)
    if case.kd_ratio < 1:
        loss = loss + (1 - case.kd_ratio) * F.cross_entropy(student, labels, ignore_index=IGNORE, reduction="none")
    entropy = -(log_p.exp() * log_p).sum(-1)
    return loss.where(valid, 0.0).sum(), entropy.where(valid, 0.0).sum()


def _divergence(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p, q) ``[n]`` with the default beta."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    def mix(weight: float) -> Tensor:
        """log(weight·p + (1 - weight)·q)."""
        return torch.logaddexp(log_p + math.log(weight), log_q + math.log(1 - weight))

    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "symmetric_kl":
        return 0.5 * kl(log_p, log_q) + 0.5 * kl(log_q, log_p)
    if name == "jsd":
        return 0.5 * kl(log_p, mix(0.5)) + 0.5 * kl(log_q, mix(0.5))
    if name == "skew_forward_kl":
        return kl(log_p, mix(0.1))
    if name == "skew_reverse_kl":
        return kl(log_q, mix(0.9))
    if name == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    raise ValueError(f"no formula for {name!r}")
