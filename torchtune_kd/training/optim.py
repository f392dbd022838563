"""Optimizer, learning-rate schedule and profiler, from their YAML sections."""

import inspect
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune.training import DummyProfiler

from torchtune_kd.training.components import component_of
from torchtune_kd.training.errors import UserError
from torchtune_kd.training.settings import build


def check_optimizer(cfg: DictConfig, device: torch.device) -> None:
    """Build optimizer and schedule over one weight, so that their mistakes are told before models are loaded.

    Raises:
        UserError: for a value that cannot be, or a ``step`` that wants more than the recipes have.
    """
    optimizer = build_optimizer(cfg, [nn.Parameter(torch.zeros(1, device=device))])
    for name, stepped in (("optimizer", optimizer), ("lr_scheduler", build_lr_scheduler(cfg, optimizer, 1))):
        parameters = {} if stepped is None else inspect.signature(type(stepped).step).parameters
        for key, parameter in list(parameters.items())[1:]:  # after self
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                raise UserError(
                    f"The section `{name}` names {type(stepped).__name__}, whose `step` wants `{key}`, which a recipe "
                    "does not have: name another."
                )


def build_optimizer(cfg: DictConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer under ``optimizer``, over the trainable parameters alone."""
    return build(cfg, "optimizer", parameters)


def build_lr_scheduler(cfg: DictConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    """The schedule under ``lr_scheduler``, stepped with the optimizer; None (a constant rate) without that section.

    torchtune's schedules take ``num_training_steps``, the steps of the whole run; PyTorch's do not.
    """
    if cfg.get("lr_scheduler") is None:
        return None
    takes = inspect.signature(component_of("lr_scheduler", cfg.lr_scheduler)).parameters
    wanted = "num_training_steps" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    steps = {"num_training_steps": total_steps} if wanted else {}
    return build(cfg, "lr_scheduler", optimizer, **steps, last_epoch=-1)


def build_profiler(cfg: DictConfig, device: torch.device) -> Any:
    """torchtune's profiler as the section ``profiler`` sets it; one that does nothing without that section."""
    if cfg.get("profiler") is None:
        return DummyProfiler()
    profiler, options = build(cfg, "profiler")
    if options.get("profile_memory", False) and device.type == "cuda":
        torch.cuda.memory._record_memory_history()  # torchtune's handler dumps the snapshot, but does not start it
    return profiler
