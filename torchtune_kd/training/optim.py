"""Optimizer, learning-rate schedule and profiler, from their YAML sections."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune.training import DummyProfiler

from torchtune_kd.training.settings import build


def build_optimizer(cfg: DictConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer under ``optimizer``, over the trainable parameters alone."""
    return build(cfg, "optimizer", parameters)


def build_lr_scheduler(cfg: DictConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    """The schedule under ``lr_scheduler`` over all steps of the run; None (a constant rate) without that section."""
    if cfg.get("lr_scheduler") is None:
        return None
    return build(cfg, "lr_scheduler", optimizer, num_training_steps=total_steps, last_epoch=-1)


def build_profiler(cfg: DictConfig, device: torch.device) -> Any:
    """torchtune's profiler as the section ``profiler`` sets it; one that does nothing without that section."""
    if cfg.get("profiler") is None:
        return DummyProfiler()
    profiler, options = build(cfg, "profiler")
    if options.get("profile_memory", False) and device.type == "cuda":
        torch.cuda.memory._record_memory_history()  # torchtune's handler dumps the snapshot, but does not start it
    return profiler
