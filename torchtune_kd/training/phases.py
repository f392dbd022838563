"""Which part of a run ran out of memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from torchtune_kd.training.errors import RunError

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
def loading(model: str, device: torch.device) -> Iterator[None]:
    """Memory that runs out in the block, in which ``model`` is built and loaded, ends the run with a sentence.

    There are no sizes yet to weigh settings by, as there are in a step; ``torchtune_kd/plan`` has them.

    Raises:
        RunError: for memory that runs out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"The memory of {device} ran out while loading the {model}, before the first step: `dtype: bf16`, a QLoRA "
            "builder as `model._component_`, more processes that share the weights or `fsdp_cpu_offload: True` take "
            "less of it; `tune run torchtune_kd/plan` with this config shows what each part takes. "
            f"({' '.join(str(error).split())[:300]})"
        ) from error


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
