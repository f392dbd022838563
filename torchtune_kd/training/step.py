"""One optimizer step: teacher first, then the student and its loss, microbatch by microbatch.

    L = 1/|V| Σ_{i∈V} [ (1-α) CE_i + α T² D_i ],   V = valid tokens of all microbatches and processes of the step

|V| is known before the first backward (labels are on the host anyway), so each microbatch's sum is divided by it
once and nothing is rescaled afterwards. FSDP2 averages gradients over the W processes, hence the factor W.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchtune_kd.training.data import Batch, attention_inputs
from torchtune_kd.training.models import HostTensor, Student, Teacher
from torchtune_kd.training.phases import phase, student_phases
from torchtune_kd.training.sharding import reshard
from torchtune_kd.training.world import World


def count_valid_tokens(step: Sequence[Batch], ignore_index: int) -> int:
    """Valid labels of this process in the microbatches of a step."""
    return sum(int((batch["labels"] != ignore_index).sum()) for batch in step)


def forward(
    student: Student, teacher: Teacher | None, batch: Batch, metrics: tuple[str, ...], world: World
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss sum (0-d, with graph if gradients are on) and metric sums of one microbatch."""

    def move(value: Any) -> Any:
        return value.to(world.device, non_blocking=True) if isinstance(value, Tensor) else value.to(world.device)

    tokens, attention = move(batch["tokens"]), attention_inputs(batch, move)
    with phase("teacher"):
        teacher_hidden = teacher(tokens, **attention) if teacher is not None else None  # [B, S, D_t], all that is kept
        teacher_head = teacher.head() if teacher is not None else None
    # the labels stay on the host: finding the valid ones there waits for no device
    with student_phases(student):
        return student(tokens, HostTensor(batch["labels"]), teacher_hidden, teacher_head, metrics, **attention)


def accumulate_gradients(
    student: Student,
    teacher: Teacher | None,
    step: Sequence[Batch],
    metrics: tuple[str, ...],
    ignore_index: int,
    world: World,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Tensor] | None:
    """Forward and backward over the microbatches of one step; gradients are those of L above, complete and reduced.

    ``interrupted`` is asked between two microbatches, on all processes with the same answer; if it is true the step
    is given up and its gradients are of no use.

    Returns:
        dict[str, Tensor] | None: sums over this process's tokens: ``loss``, the metrics asked for, ``num_tokens``;
        None if the step was given up.
    """
    num_tokens = world.sum(torch.full((), float(count_valid_tokens(step, ignore_index)), device=world.device))
    scale = world.size / num_tokens.clamp(min=1)  # no valid token anywhere: the loss sum is 0 and stays 0
    sums: dict[str, Tensor] = {}
    for index, batch in enumerate(step):
        if index > 0 and interrupted():
            if teacher is not None:
                teacher.release()
            reshard(student)
            return None
        if isinstance(student, FSDPModule):
            is_last = index + 1 == len(step)
            student.set_requires_gradient_sync(is_last)
            student.set_reshard_after_backward(is_last, recurse=student.keeps_layers_gathered)
        loss, batch_sums = forward(student, teacher, batch, metrics, world)
        with phase("backward"):
            (loss * scale).backward()
        add(sums, {"loss": loss.detach(), **batch_sums})
    if teacher is not None:
        teacher.release()
    return sums


def add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add ``more`` to ``sums`` in place, name by name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


@phase("optimizer")
def gradient_norm(parameters: Sequence[nn.Parameter], clip: float | None) -> Tensor:
    """The 2-norm of all gradients over all processes (0-d, fp32); with ``clip`` they are scaled down to that norm."""
    # torch.nn.utils.get_total_norm would sum bf16 gradients in bf16
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm
