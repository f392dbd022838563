"""Count how much of a device's time goes to the teacher."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchtune_kd.data.batches import Batch
from torchtune_kd.losses.signals import Signal
from torchtune_kd.teachers.base import Teacher


class TimedTeacher:
    """Do what a teacher does, and count the device's time that its signals take.

    A CUDA device is asked by events on its stream, so that the host waits for nothing until :meth:`seconds`; what the
    teacher waits for, such as weights that other processes send, counts as its time.

    Args:
        teacher (Teacher): gives the signals.
        device (torch.device): runs it.

    Attributes:
        teacher (Teacher): the same.
    """

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self.teacher = teacher
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event] | tuple[float, float]] = []

    def signal(self, batch: Batch) -> Signal | None:
        """Return the teacher's signal."""
        begin = self._now()
        signal = self.teacher.signal(batch)
        self._spans.append((begin, self._now()))
        return signal

    def expect(self, batch: Batch) -> None:
        """Let the teacher prepare for a batch."""
        self.teacher.expect(batch)

    def end_step(self, student: nn.Module) -> None:
        """Give back what the teacher no longer needs."""
        self.teacher.end_step(student)

    def after_update(self, student: nn.Module) -> None:
        """Let the teacher follow the student."""
        self.teacher.after_update(student)

    def kept_state(self) -> Mapping[str, Tensor]:
        """Return what the teacher keeps."""
        return self.teacher.kept_state()

    def close(self) -> None:
        """Close the teacher."""
        self.teacher.close()

    def seconds(self) -> float:
        """Return what the signals took since :meth:`restart`; waits for the last of them."""
        if self._on_cuda and self._spans:
            self._spans[-1][1].synchronize()
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        return sum(end - begin for begin, end in self._spans)

    def restart(self) -> None:
        """Count from here on."""
        self._spans.clear()

    def _now(self) -> "torch.cuda.Event | float":
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
