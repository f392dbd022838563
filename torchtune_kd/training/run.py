"""A run: everything a recipe sets up, and what it does with it again and again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchdata.stateful_dataloader import StatefulDataLoader

from torchtune_kd.checkpoints.progress import Progress
from torchtune_kd.checkpoints.rng import preserved_rng, rng_state
from torchtune_kd.checkpoints.saver import Saver
from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.data.batches import Batch
from torchtune_kd.data.steps import microbatches, steps_left
from torchtune_kd.distributed.world import World
from torchtune_kd.models.student import Student
from torchtune_kd.teachers.base import Teacher
from torchtune_kd.training.events import Events
from torchtune_kd.training.log import TrainingLog
from torchtune_kd.training.signals import StopRequests
from torchtune_kd.training.time_limit import TimeLimit


@dataclass
class Run:
    """Hold what ``set_up`` has built, and where the run stands."""

    config: Config
    world: World
    ignore_index: int
    loader: StatefulDataLoader
    val_loader: StatefulDataLoader | None
    total_steps: int  # with max_minutes, as many as are planned at present
    teacher: Teacher
    student: Student
    trainable: list[nn.Parameter]
    checkpointer: Any
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    profiler: Any
    log: TrainingLog
    saver: Saver
    events: Events
    previous_run: list[Path]  # what an earlier run left in the output folder, until the first save replaces it
    progress: Progress
    scheduled_steps: int  # of the data and the config, whatever the time
    time_limit: TimeLimit | None = None
    stop_requests: StopRequests = field(default_factory=StopRequests)
    microbatches: list[Batch] | None = None  # of the step that is being taken; None in a validation
    stopping: bool = False  # all processes know that one of them was asked to stop
    validation: dict[str, float] | None = None  # of this very step, where there was one
    generators: dict[str, Any] = field(default_factory=dict)  # as they were before the step's rows were read

    @property
    def settings(self) -> Settings:
        return self.config.settings

    def epochs(self) -> range:
        """Return the epochs that are left, the one in which the run stands included."""
        return range(self.progress.epoch, self.settings.epochs)

    @property
    def global_step(self) -> int:
        return self.progress.global_step

    @property
    def time_is_up(self) -> bool:
        """Return whether the run ends here since its minutes are over; the same on all processes."""
        return self.time_limit is not None and self.total_steps <= self.progress.global_step < self.scheduled_steps

    def on(self, event: str, listener: Callable[[], None]) -> None:
        """Call ``listener`` at every ``event`` of the run, see :mod:`torchtune_kd.training.events`."""
        self.events.on(event, listener)

    def close(self) -> None:
        """Finish what is being written, and read nothing more."""
        self.teacher.close()
        self.saver.close()
        self.log.close()


def steps(run: Run, epoch: int) -> Iterator[list[Batch]]:
    """Yield the microbatches of each optimizer step that is left in ``epoch``; none once the time is up."""
    run.events.announce("epoch")
    if run.time_is_up:
        return
    progress = run.progress
    if progress.epoch != epoch:
        progress.epoch, progress.step_in_epoch, progress.samples = epoch, 0, 0
    run.loader.sampler.load_state_dict({"epoch": epoch, "position": progress.samples})
    with preserved_rng(run.world.device):  # a loader draws a seed when it begins
        batches = iter(run.loader)
    left = steps_left_in_epoch(run.loader, run.settings, progress)
    run.generators = rng_state(run.world.device)
    for step in microbatches(batches, run.settings.gradient_accumulation_steps, left):
        yield step
        if run.time_is_up:
            return
        run.generators = rng_state(run.world.device)  # before the next rows are read, which may draw from them


def asked_to_stop(run: Run) -> bool:
    run.stopping = run.stopping or run.world.any(run.stop_requests.pending)
    return run.stopping


def steps_left_in_epoch(loader: StatefulDataLoader, settings: Settings, progress: Progress) -> int:
    """Count the optimizer steps from the sampler's position to the end of its epoch."""
    limit = None if settings.max_steps_per_epoch is None else settings.max_steps_per_epoch - progress.step_in_epoch
    return steps_left(loader, settings.gradient_accumulation_steps, limit)
