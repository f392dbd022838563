"""Validation: the objective and the distances to the teacher on held-out data."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torchtune_kd.training.data import Batch
from torchtune_kd.training.metrics import means
from torchtune_kd.training.models import Student, Teacher
from torchtune_kd.training.sharding import reshard
from torchtune_kd.training.step import add, forward
from torchtune_kd.training.world import World


@torch.no_grad()
def evaluate(
    student: Student,
    teacher: Teacher | None,
    batches: Iterable[Batch],
    metrics: tuple[str, ...],
    world: World,
    max_batches: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means per valid token over ``batches`` (at most ``max_batches`` per process) and all processes.

    ``interrupted`` is asked before every batch, on all processes with the same answer; if it is true there are no
    means and None comes back. The student is in eval mode meanwhile and no gradient is computed. Returns the names of
    ``metrics`` plus ``loss`` and ``num_tokens``; see :mod:`torchtune_kd.training.metrics` for units.
    """
    was_training = student.training
    student.eval()
    sums: dict[str, Tensor] = {}
    stopped = False
    for batch in itertools.islice(batches, max_batches):
        stopped = interrupted()
        if stopped:
            break
        loss, batch_sums = forward(student, teacher, batch, metrics, world)
        add(sums, {"loss": loss, **batch_sums})
    if teacher is not None:
        teacher.release()
    reshard(student)
    student.train(was_training)
    return None if stopped else means(sums, world)
