"""torchtune's losses, with its cross-entropy beside them and the stock recipe's sum of the two.

Without chunks its decoder gives logits in fp32, in chunks in the models' dtype; with `compile: True` the stock
recipes compile the losses. Legend: N tokens, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._inputs import IGNORE, Inputs

CHUNKS = 8  # of torchtune's KD configs
_NAMES = {"forward_kl": "ForwardKL", "reverse_kl": "ReverseKL", "symmetric_kl": "SymmetricKL"}


def from_logits(inputs: Inputs, case: Case) -> Tensor:
    return _objective(case.divergence)(inputs.student, inputs.teacher, inputs.labels, case.kd_ratio, case.temperature)


def from_logits_compiled(inputs: Inputs, case: Case) -> Tensor:
    loss = _compiled_objective(case.divergence)
    return loss(inputs.student, inputs.teacher, inputs.labels, case.kd_ratio, case.temperature)


def full(inputs: Inputs, case: Case) -> Tensor:
    return from_logits(_with_logits(inputs), case)


def full_compiled(inputs: Inputs, case: Case) -> Tensor:
    return from_logits_compiled(_with_logits(inputs), case)


def chunked(inputs: Inputs, case: Case) -> Tensor:
    return _chunked(inputs, case, *_chunked_losses(case.divergence))


def chunked_compiled(inputs: Inputs, case: Case) -> Tensor:
    return _chunked(inputs, case, *_compiled_chunked_losses(case.divergence))


@functools.cache
def _objective(divergence: str) -> Callable[..., Tensor]:
    """Both losses of logits ``[N, V]``; it has no temperature, so the caller divides the logits."""
    import torchtune.modules.loss as losses

    kd_loss = getattr(losses, f"{_NAMES[divergence]}Loss")(ignore_index=IGNORE)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, kd_ratio: float, temperature: float) -> Tensor:
        class_loss = F.cross_entropy(student.float(), labels, ignore_index=IGNORE)
        if temperature != 1:
            student, teacher = student.float() / temperature, teacher.float() / temperature
        return (1 - kd_ratio) * class_loss + kd_ratio * temperature**2 * kd_loss(student, teacher, labels)

    return loss


@functools.cache
def _compiled_objective(divergence: str) -> Callable[..., Tensor]:
    return torch.compile(_objective(divergence), dynamic=False)


def _with_logits(inputs: Inputs) -> Inputs:
    student = F.linear(inputs.student, inputs.student_head).float()
    with torch.no_grad():
        teacher = F.linear(inputs.teacher, inputs.teacher_head).float()
    return inputs._replace(student=student, teacher=teacher)


@functools.cache
def _chunked_losses(divergence: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Cross-entropy and divergence over lists of logits ``[1, N/8, V]``."""
    import torchtune.modules.loss as losses

    kd_loss = getattr(losses, f"{_NAMES[divergence]}WithChunkedOutputLoss")(CHUNKS, ignore_index=IGNORE)
    return losses.CEWithChunkedOutputLoss(CHUNKS, IGNORE), kd_loss


@functools.cache
def _compiled_chunked_losses(divergence: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Compile what `torchtune.training.compile_loss` compiles, for shapes that are fixed."""
    class_loss, kd_loss = _chunked_losses.__wrapped__(divergence)
    class_loss.compute_cross_entropy = torch.compile(class_loss.compute_cross_entropy, dynamic=False)
    inner = {"forward_kl": "fkl_loss", "reverse_kl": "rkl_loss", "symmetric_kl": "sym_kl_loss"}[divergence]
    setattr(kd_loss, inner, torch.compile(getattr(kd_loss, inner), dynamic=False))
    return class_loss, kd_loss


def _chunked(inputs: Inputs, case: Case, class_loss: Callable[..., Tensor], kd_loss: Callable[..., Tensor]) -> Tensor:
    labels = inputs.labels.unsqueeze(0)  # [1, N]
    student = [F.linear(h, inputs.student_head) for h in inputs.student.unsqueeze(0).chunk(CHUNKS, dim=1)]
    with torch.no_grad():
        teacher = [F.linear(h, inputs.teacher_head) for h in inputs.teacher.unsqueeze(0).chunk(CHUNKS, dim=1)]
    loss = (1 - case.kd_ratio) * class_loss(student, labels)
    if case.temperature != 1:
        student, teacher = ([chunk / case.temperature for chunk in chunks] for chunks in (student, teacher))
    return loss + case.kd_ratio * case.temperature**2 * kd_loss(student, teacher, labels)
