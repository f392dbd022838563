"""How many steps fit into the demo's time on this machine. Shapes: B batch, S sequence."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

import torchtune_kd.training as kd
from torchtune_kd.training.optim import build_optimizer

SECONDS = 310  # that the whole demo aims at
LEAST, MOST = 40, 600  # steps
_STARTING = 15  # seconds that the training process needs to start, load and save
_MEASURING = 30  # seconds for what follows the training
_VOCABULARY = 49152  # of SmolLM2


@dataclass(frozen=True)
class Pace:
    """Seconds that one optimizer step and the validation of one batch take."""

    step: float
    validation: float


def measure_pace(config: DictConfig) -> Pace:
    """Time the recipe's own step and validation with the run's models, on random tokens.

    Args:
        config (DictConfig): The config of the run that is to come, with its paths.
    """
    settings = kd.read_settings(config, distributed=False)
    world = kd.single_process(settings.device)
    kd_loss = kd.build_kd_loss(config)
    teacher = kd.build_teacher(config, settings, world)
    _, weights = kd.load_weights(config.checkpointer, "checkpointer")
    student = kd.build_student(config, settings, world, kd_loss, weights, seed=0)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config, trainable)
    metrics = kd.validation_metrics(settings)
    length = config.tokenizer.max_seq_len - 1

    def batch(size: int) -> dict[str, Any]:
        tokens = torch.randint(_VOCABULARY, (size, length))  # [B, S]
        return {"tokens": tokens, "labels": tokens.roll(-1, dims=1)}

    def step() -> None:
        microbatches = [batch(settings.batch_size) for _ in range(settings.gradient_accumulation_steps)]
        kd.accumulate_gradients(student, teacher, microbatches, metrics, kd_loss.ignore_index, world)
        kd.gradient_norm(trainable, settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def validation() -> None:
        kd.evaluate(student, teacher, [batch(settings.batch_size_val or settings.batch_size)], metrics, world)

    _seconds(step)  # the first one allocates
    return Pace(step=min(_seconds(step) for _ in range(2)), validation=_seconds(validation))


def steps_that_fit(pace: Pace, elapsed: float, validation_batches: int) -> int:
    """Steps after which the demo ends about :data:`SECONDS` after its start, within bounds.

    Args:
        pace (Pace): What :func:`measure_pace` measured.
        elapsed (float): Seconds since the start of the demo.
        validation_batches (int): Batches of all validations of the run together.
    """
    left = SECONDS - elapsed - _STARTING - _MEASURING - validation_batches * pace.validation
    return min(max(int(left / pace.step), LEAST), MOST)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
