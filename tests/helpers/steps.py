"""One optimizer step outside of a recipe, as its page takes it."""

from torch import Tensor

from torchtune_kd.training.step import Step


def accumulate(student, teacher, microbatches, metrics, ignore_index, world) -> dict[str, Tensor]:
    """Leave the gradients of a step with the student; return the sums over this process's tokens."""
    step = Step(student, microbatches, metrics, ignore_index, world)
    for batch in step:
        step.backward(*student(batch, teacher.signal(batch), step.metrics))
    teacher.end_step(student)
    return step.sums
