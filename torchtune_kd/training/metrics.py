"""From sums on the devices to the numbers that are logged.

Per token, natural logarithms (nats): ``loss`` (the objective), ``class_loss`` (cross-entropy on the labels),
``kd_loss`` (the divergence at the run's temperature, T² included), ``kl`` (true KL(teacher ‖ student) at T=1),
``top1_agreement``, ``student_entropy``, ``teacher_entropy``, ``acceptance_rate`` (Σ min(p, q)).
"""

import time
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training
from tqdm import tqdm

from torchtune_kd.training.settings import Settings, build
from torchtune_kd.training.world import World

DISTANCES = ("kl", "top1_agreement", "student_entropy", "teacher_entropy", "acceptance_rate")


def training_metrics(settings: Settings) -> tuple[str, ...]:
    """What is logged of a training step; no cross-entropy at kd_ratio 1, no distances without a teacher."""
    if not settings.uses_teacher:
        return ("class_loss", "student_entropy")
    return ("class_loss", "kd_loss", *DISTANCES) if settings.kd_ratio < 1 else ("kd_loss", *DISTANCES)


def validation_metrics(settings: Settings) -> tuple[str, ...]:
    if not settings.uses_teacher:
        return ("class_loss", "student_entropy")
    return ("class_loss", "teacher_class_loss", "kd_loss", *DISTANCES)


def means(sums: dict[str, Tensor], world: World) -> dict[str, float]:
    """Per-token means over all processes of sums that hold ``num_tokens``; one all-reduce, one host read.

    ``num_tokens`` itself stays a sum. Without a valid token the means are 0.
    """
    names = list(sums)
    total = world.sum(torch.stack([sums[name].float() for name in names])).tolist()
    values = dict(zip(names, total, strict=True))
    count = max(values["num_tokens"], 1.0)
    return {name: value if name == "num_tokens" else value / count for name, value in values.items()}


class TrainingLog:
    """Writes steps and validations to torchtune's metric logger and to a progress bar, from rank 0."""

    def __init__(self, cfg: DictConfig, settings: Settings, world: World, total_steps: int) -> None:
        self._settings, self._world = settings, world
        self._logger: Any = None
        self._bar: tqdm | None = None
        if world.is_rank_zero:
            self._logger = build(cfg, "metric_logger")
            self._logger.log_config(cfg)
            self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True)
        self._memory = settings.log_peak_memory_stats and world.device.type == "cuda"
        self._tokens = torch.zeros(())
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step (validation, saving) out of the tokens per second."""
        self._tokens.zero_()
        self._start = time.perf_counter()

    def wants(self, step: int) -> tuple[str, ...]:
        """The metrics to compute in optimizer step ``step`` (counted from 1); none between logged steps."""
        return training_metrics(self._settings) if self._is_logged(step) else ()

    def log_step(self, step: int, epoch: int, sums: dict[str, Tensor], lr: float, grad_norm: Tensor) -> None:
        """Count the step's tokens; at logged steps, write its means. Called by every process."""
        self._tokens = self._tokens.to(sums["num_tokens"].device) + sums["num_tokens"]
        if self._bar is not None:
            self._bar.update(1)
        if not self._is_logged(step):
            return
        tokens = self._world.sum(self._tokens)
        values = means(sums, self._world)
        values.pop("num_tokens")
        values |= {"lr": lr, "grad_norm": float(grad_norm)}
        elapsed = time.perf_counter() - self._start
        values["tokens_per_second_per_gpu"] = float(tokens) / elapsed / self._world.size
        if self._memory:
            values |= training.get_memory_stats(device=self._world.device)
        if self._bar is not None:
            shown = {
                "loss": values["loss"],
                "kl": values.get("kl"),
                "tokens/s": values["tokens_per_second_per_gpu"],
            }
            self._bar.set_description(f"{epoch + 1}|{step}")
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None}, refresh=False)
            self._logger.log_dict(values, step=step)
        self.restart_clock()

    def log_validation(self, step: int, values: dict[str, float]) -> None:
        """Write ``val_<name>`` for every mean of a validation."""
        if self._logger is not None:
            kept = {f"val_{name}": value for name, value in values.items() if name != "num_tokens"}
            self._logger.log_dict(kept, step=step)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in kept.items() if name in _SHOWN)
            tqdm.write(f"step {step}: {shown}")
        self.restart_clock()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._logger.close()

    def _is_logged(self, step: int) -> bool:
        return step % self._settings.log_every_n_steps == 0


_SHOWN = ("val_loss", "val_class_loss", "val_kl", "val_top1_agreement")
