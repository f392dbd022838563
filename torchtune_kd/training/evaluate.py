"""Validation: the objective and the distances to the teacher on held-out data."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torchtune_kd.checkpoints.rng import preserved_rng
from torchtune_kd.config.metrics import validation_metrics
from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.sharding import reshard
from torchtune_kd.distributed.world import World
from torchtune_kd.models.student import Student
from torchtune_kd.teachers.base import Teacher
from torchtune_kd.training.log import means
from torchtune_kd.training.run import Run, asked_to_stop
from torchtune_kd.training.step import add_sums


@torch.no_grad()
def evaluate(
    student: Student,
    teacher: Teacher,
    batches: Iterable[Batch],
    metrics: tuple[str, ...],
    world: World,
    max_batches: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means per valid token over ``batches`` (at most ``max_batches`` per process) and all processes.

    ``interrupted`` is asked before every batch, on all processes with the same answer; if it is true there are no
    means and None comes back. The student is in eval mode meanwhile and no gradient is computed. Returns the names of
    ``metrics`` plus ``loss`` and ``num_tokens``; see :mod:`torchtune_kd.training.log` for units.
    """
    was_training = student.training
    student.eval()
    sums: dict[str, Tensor] = {}
    stopped = False
    for batch in itertools.islice(batches, max_batches):
        stopped = interrupted()
        if stopped:
            break
        teacher.expect(batch)
        batch = batch.to(world.device)
        loss, batch_sums = student(batch, teacher.signal(batch), metrics)
        add_sums(sums, {"loss": loss, **batch_sums})
    teacher.end_step(student)
    reshard(student)
    student.train(was_training)
    return None if stopped else means(sums, world)


def validate_if_due(run: Run) -> None:
    """Log the means over ``dataset_val``, where there is one: before the first step, every so often, at the end."""
    if not run.progress.validation_pending:
        return
    if run.val_loader is not None:
        metrics = validation_metrics(run.config)
        if run.time_limit is not None:
            run.time_limit.begin_validation()
        run.events.announce("validation")
        run.microbatches = None
        with preserved_rng(run.world.device):  # to validate more often changes no step
            values = evaluate(
                run.student,
                run.teacher,
                run.val_loader,
                metrics,
                run.world,
                max_batches=run.settings.max_val_batches,
                interrupted=lambda: asked_to_stop(run),
            )
        if values is None:
            return  # what is left out here comes first when the run goes on
        run.validation = run.log.log_validation(run.progress.global_step, values)
        if run.time_limit is not None:
            run.time_limit.end_validation()
    run.progress.validation_pending = False
