"""The student as its own teacher: without its adapters, or averaged over its steps.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.sharding import reshard
from torchtune_kd.errors import phase
from torchtune_kd.losses.signals import Head, Hidden
from torchtune_kd.models.adapters import adapters_off, without_checkpoint_wrapper
from torchtune_kd.models.student import Student
from torchtune_kd.teachers.base import Unchanging


class BaseTeacher(Unchanging):
    """The weights that a LoRA, DoRA or QLoRA student starts from: its adapters are off while it teaches.

    Args:
        student (Student): with adapters.
    """

    def __init__(self, student: Student) -> None:
        self._student = student

    def signal(self, batch: Batch) -> Hidden:
        """Return the last hidden states [B, S, D] and the head of the base model."""
        with phase("teacher"), adapters_off(self._student.decoder):
            states, weight, bias = self._student.teach(batch.tokens, **batch.attention)
        return Hidden((states,), (Head(weight, bias),))


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory; of one that is not sharded all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


class AverageTeacher(Unchanging):
    """An exponential moving average of the weights that train, w̄ ← d w̄ + (1 - d) w, in fp32.

    In bf16 it would stand still: with d = 0.999 an update is below half a unit in the last place of w̄. Adapters are
    averaged as they are, A and B apart, which is not the average of their product.

    Args:
        student (Student): whose weights are averaged, from where they stand.
        decay (float): d.
        every_n_steps (int): optimizer steps between two updates.
        local (Callable[[Tensor], Tensor]): returns what this process holds of a weight, in the same memory.
    """

    def __init__(
        self,
        student: Student,
        decay: float,
        every_n_steps: int,
        local: Callable[[Tensor], Tensor] = local_part,
    ) -> None:
        self._student, self._decay, self._every_n_steps, self._local = student, decay, every_n_steps, local
        self._weights = {name: weight for name, weight in student.decoder.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().to(torch.float32, copy=True) for name, weight in self._weights.items()}
        self._steps = torch.zeros((), dtype=torch.int64)

    def signal(self, batch: Batch) -> Hidden:
        """Return the last hidden states [B, S, D] and the head of the averaged student."""
        with phase("teacher"), self._in_place():
            states, weight, bias = self._student.teach(batch.tokens, **batch.attention)
            # the student's own come back into the same memory
            head = Head(weight.clone(), None if bias is None else bias.clone())
            reshard(self._student)
        return Hidden((states,), (head,))

    @torch.no_grad()
    def after_update(self, student: nn.Module) -> None:
        """Move the average towards the weights as they are after an optimizer step."""
        self._steps += 1
        if int(self._steps) % self._every_n_steps:
            return
        for name, average in self._averages.items():
            self._local(average).lerp_(self._local(self._weights[name]).float(), 1 - self._decay)

    def kept_state(self) -> Mapping[str, Tensor]:
        """Return the averages and the count of steps: not copies, to be read into in place."""
        averages = {without_checkpoint_wrapper(name): average for name, average in self._averages.items()}
        return {"steps": self._steps, **{f"average.{name}": average for name, average in averages.items()}}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put the averages where the weights are, each process its shards; before they are gathered."""
        reshard(self._student)
        with torch.no_grad():
            kept = {name: self._local(weight).clone() for name, weight in self._weights.items()}
            for name, weight in self._weights.items():
                self._local(weight).copy_(self._local(self._averages[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    self._local(weight).copy_(kept[name])
