"""Optimizer, learning-rate schedule and profiler, from their YAML sections."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchtune.training import DummyProfiler

from torchtune_kd.config.reading import Config
from torchtune_kd.config.sections import Section
from torchtune_kd.errors import UserError


def check_optimizer(config: Config, device: torch.device) -> None:
    """Build optimizer and schedule over one weight, so that their mistakes are told before models are loaded.

    Raises:
        UserError: for a value that cannot be, a ``step`` that wants more than the recipes have, or a schedule that
            cannot follow ``max_minutes``.
    """
    optimizer = config.optimizer.build([nn.Parameter(torch.zeros(1, device=device))])
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, 1)
    for name, stepped in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        parameters = {} if stepped is None else inspect.signature(type(stepped).step).parameters
        for key, parameter in list(parameters.items())[1:]:  # after self
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                raise UserError(
                    f"The section `{name}` names {type(stepped).__name__}, whose `step` wants `{key}`, which a recipe "
                    "does not have: name another."
                )
    if config.settings.max_minutes is not None and lr_scheduler is not None and not isinstance(lr_scheduler, LambdaLR):
        raise UserError(
            f"The section `lr_scheduler` names {type(lr_scheduler).__name__}, whose rates do not follow from a "
            "position alone, as a run with `max_minutes` needs it: name a function that makes a LambdaLR, such as "
            "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, or set it to null."
        )


def move_schedule(lr_scheduler: LambdaLR, position: float) -> None:
    """Set the rates to those of ``position``, counted in steps of the schedule; never back."""
    lr_scheduler.last_epoch = max(position, lr_scheduler.last_epoch) - 1
    lr_scheduler.step()


def build_lr_scheduler(section: Section | None, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    """Build the schedule that is stepped with the optimizer; None (a constant rate) without a section.

    torchtune's schedules take ``num_training_steps``, the steps of the whole run; PyTorch's do not.
    """
    if section is None:
        return None
    takes = section.parameters()
    wanted = "num_training_steps" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    steps = {"num_training_steps": total_steps} if wanted else {}
    return section.build(optimizer, **steps, last_epoch=-1)


def build_profiler(section: Section | None, device: torch.device) -> Any:
    """Build torchtune's profiler; one that does nothing without a section."""
    if section is None:
        return DummyProfiler()
    profiler, options = section.build()
    if options.get("profile_memory", False) and device.type == "cuda":
        torch.cuda.memory._record_memory_history()  # torchtune's handler dumps the snapshot, but does not start it
    return profiler
