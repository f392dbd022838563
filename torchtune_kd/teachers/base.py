"""What every kind of teacher does for the loop."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from torchtune_kd.data.batches import Batch
from torchtune_kd.losses.signals import Signal


class Teacher(Protocol):
    """Give what a student is measured against. A teacher knows no student; one that needs it is handed it."""

    def signal(self, batch: Batch) -> Signal | None:
        """Return what the loss is measured against, on the batch's device and without a graph."""
        ...

    def expect(self, batch: Batch) -> None:
        """Prepare for a batch, still on the host, whose signal will be the next to be asked for."""
        ...

    def end_step(self, student: nn.Module) -> None:
        """Give back what an optimizer step, or a validation, no longer needs."""
        ...

    def after_update(self, student: nn.Module) -> None:
        """Follow the student, whose weights have just been updated."""
        ...

    def kept_state(self) -> Mapping[str, Tensor]:
        """Return what changes while the student trains, for its checkpoints; they are read into the same tensors."""
        ...

    def close(self) -> None:
        """End what goes on beside the run, which asks for no further signal."""
        ...


class Unchanging:
    """Do what a teacher does that no step of the student changes."""

    def expect(self, batch: Batch) -> None:
        """Prepare nothing."""

    def end_step(self, student: nn.Module) -> None:
        """Hold nothing."""

    def after_update(self, student: nn.Module) -> None:
        """Follow nobody."""

    def kept_state(self) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """End nothing."""


class NoTeacher(Unchanging):
    """Stands for a teacher at ``kd_ratio: 0``."""

    def signal(self, batch: Batch) -> None:
        """Return nothing: the loss is the cross-entropy alone."""
