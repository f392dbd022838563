"""Which part of a run ran out of memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

PHASES = ("teacher", "student forward", "loss", "backward", "optimizer")


class OutOfMemory(Exception):
    """The device's memory is full. ``phase`` is one of :data:`PHASES`."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase)
        self.phase = phase


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Say of memory that runs out in the block that it ran out in ``name``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(name) from error


@contextlib.contextmanager
def student_phases(student: nn.Module) -> Iterator[None]:
    """The student computes its loss in the same forward: once its decoder is done, the phase is ``loss``."""
    decoder_is_done = []
    handle = student.decoder.register_forward_hook(lambda *_: decoder_is_done.append(True))
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("loss" if decoder_is_done else "student forward") from error
    finally:
        handle.remove()
