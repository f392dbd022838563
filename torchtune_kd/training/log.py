"""From sums on the devices to the numbers that are logged.

Per token, natural logarithms (nats): ``loss`` (the objective), ``class_loss`` (cross-entropy on the labels),
``kd_loss`` (the divergence at the run's temperature, T² included), ``kl`` (true KL(teacher ‖ student) at T=1),
``top1_agreement``, ``student_entropy``, ``teacher_entropy``, ``acceptance_rate`` (Σ min(p, q)). ``tokens_seen`` counts
the valid tokens of the run so far, over all processes; ``teacher_time_share`` is the part of the time since the last
logged step in which the device of rank 0 ran the teacher.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune import training
from torchtune.training.metric_logging import DiskLogger
from tqdm import tqdm

from torchtune_kd.checkpoints.progress import Progress
from torchtune_kd.config.metrics import training_metrics
from torchtune_kd.config.reading import Config
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, first_line, say
from torchtune_kd.teachers.timed import TimedTeacher


def means(sums: dict[str, Tensor], world: World) -> dict[str, float]:
    """Compute per-token means over all processes of sums that hold ``num_tokens``: one all-reduce, one host read.

    ``num_tokens`` itself stays a sum. Without a valid token the means are 0.
    """
    names = list(sums)
    total = world.sum(torch.stack([sums[name].float() for name in names])).tolist()
    values = dict(zip(names, total, strict=True))
    count = max(values["num_tokens"], 1.0)
    return {name: value if name == "num_tokens" else value / count for name, value in values.items()}


class TrainingLog:
    """Writes steps and validations to torchtune's metric logger and to a progress bar, from rank 0.

    Attributes:
        teacher (TimedTeacher | None): whose share of the time is logged.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        total_steps: int,
        progress: Progress,
        log_file: str | None = None,
    ) -> None:
        settings = config.settings
        self._config, self._settings, self._world = config, settings, world
        self.teacher: TimedTeacher | None = None
        self._logger: Any = None
        self._told = False  # that the log cannot be written
        self._bar: tqdm | None = None
        problem = None
        if world.is_rank_zero and (old := _log_to_go_on_with(config, log_file)) is not None:
            problem = _cut_log(old, progress)
        problem = world.gather(problem)[0]
        if problem is not None:
            raise UserError(problem)
        if world.is_rank_zero:
            self._logger = _build_logger(config, log_file)
            self._logger.log_config(config.written)
            self._bar = tqdm(total=total_steps, initial=progress.global_step, unit="step", dynamic_ncols=True)
        self._memory = settings.log_peak_memory_stats and world.device.type == "cuda"
        self._tokens = torch.zeros(())
        # of the run; float64 counts exactly to 9e15
        self._all_tokens = torch.full((), progress.tokens if world.is_rank_zero else 0, dtype=torch.float64)
        self.restart_clock()

    def all_tokens(self) -> int:
        """Count the valid tokens of the run so far, over all processes (called by all of them)."""
        return int(self._world.sum(self._all_tokens.to(self._world.device)))

    def file(self) -> str | None:
        """Return where torchtune's ``DiskLogger`` writes, so that a resumed run can go on in the same file."""
        return str(self._logger.path_to_log_file()) if isinstance(self._logger, DiskLogger) else None

    def say(self, sentence: str) -> None:
        """Print a sentence for whoever reads the run's output, from rank 0."""
        if self._world.is_rank_zero:
            say(sentence)

    def set_total(self, total_steps: int) -> None:
        """Let the progress bar end after so many steps."""
        if self._bar is not None:
            self._bar.total = total_steps

    def restart_clock(self) -> None:
        """Leave what happened since the last step (validation, saving) out of the tokens per second."""
        self._tokens.zero_()
        if self.teacher is not None:
            self.teacher.restart()
        self._start = time.perf_counter()

    def wants(self, step: int) -> tuple[str, ...]:
        """Return the metrics to compute in optimizer step ``step`` (counted from 1); none between logged steps."""
        return training_metrics(self._config) if self._is_logged(step) else ()

    def log_step(
        self, step: int, epoch: int, sums: dict[str, Tensor], lr: float, grad_norm: float, skipped_steps: int
    ) -> None:
        """Count the step's tokens; at logged steps, write its means. Called by every process."""
        self._tokens = self._tokens.to(sums["num_tokens"].device) + sums["num_tokens"]
        self._all_tokens = self._all_tokens.to(sums["num_tokens"].device) + sums["num_tokens"]
        if self._bar is not None:
            self._bar.update(1)
        if not self._is_logged(step):
            return
        tokens, all_tokens = self._world.sum(torch.stack([self._tokens.double(), self._all_tokens]))
        values = means(sums, self._world)
        values.pop("num_tokens")
        values |= {"lr": lr, "grad_norm": grad_norm}
        if skipped_steps:
            values["skipped_steps"] = skipped_steps
        elapsed = time.perf_counter() - self._start
        values["tokens_per_second_per_gpu"] = float(tokens) / elapsed / self._world.size
        values["tokens_seen"] = int(all_tokens)
        if self.teacher is not None:
            values["teacher_time_share"] = self.teacher.seconds() / elapsed
        if self._memory:
            values |= training.get_memory_stats(device=self._world.device)
        if self._bar is not None:
            shown = {
                "loss": values["loss"],
                "kl": values.get("kl", values.get("kl_cells")),
                "tokens/s": values["tokens_per_second_per_gpu"],
            }
            self._bar.set_description(f"{epoch + 1}|{step}")
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None}, refresh=False)
            self._write(values, step)
        self.restart_clock()

    def log_validation(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Write ``val_<name>`` for every mean of a validation, and return them by these names."""
        kept = {f"val_{name}": value for name, value in values.items() if name != "num_tokens"}
        if self._logger is not None:
            self._write(kept, step)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in kept.items() if name in _SHOWN)
            tqdm.write(f"step {step}: {shown}")
        self.restart_clock()
        return kept

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            with self._unwritable_is_told():
                self._logger.close()

    def _write(self, values: dict[str, float], step: int) -> None:
        with self._unwritable_is_told():
            self._logger.log_dict(values, step=step)

    @contextlib.contextmanager
    def _unwritable_is_told(self) -> Iterator[None]:
        """Let a full disk cost log lines, which wait for room in torchtune's logger, but not the run."""
        try:
            yield
        except OSError as error:
            if not self._told:
                say(f"warning: the log cannot be written ({first_line(error)}): the run goes on.")
            self._told = True
        else:
            self._told = False

    def _is_logged(self, step: int) -> bool:
        return step % self._settings.log_every_n_steps == 0


def _build_logger(config: Config, log_file: str | None) -> Any:
    """Build the metric logger; torchtune's log on disk goes on where the checkpoint was written."""
    section, path = config.metric_logger, _log_to_go_on_with(config, log_file)
    if path is not None:
        section = section.changed(filename=str(path.absolute()))
    return section.build()


def _log_to_go_on_with(config: Config, log_file: str | None) -> Path | None:
    section = config.metric_logger
    name = section.get("filename") or (log_file and Path(log_file).name)
    on_disk = section.component.rpartition(".")[2] == DiskLogger.__name__
    return (
        Path(str(section.get("log_dir"))) / name
        if config.settings.resume_from_checkpoint and on_disk and name
        else None
    )


def _cut_log(path: Path, progress: Progress) -> str | None:
    """Drop the lines of steps that are to be done again, and one that a kill cut short; a sentence if that fails."""
    shorter = path.with_name(path.name + ".partial")
    try:
        if not path.is_file():
            return None
        shorter.write_text("".join(_lines_until(progress, path.read_text())))
        shorter.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            shorter.unlink(missing_ok=True)
        return (
            f"The log {path} could not be cut to where the checkpoint was written ({first_line(error)}): "
            "make room there, or make it writable, then start again."
        )
    return None


def _lines_until(progress: Progress, log: str) -> Iterator[str]:
    for line in log.splitlines(keepends=True):
        match = re.match(r"Step (\d+) \| (val_)?", line)
        if match is None or not line.endswith("\n"):
            continue
        step, pending = int(match[1]), match[2] is not None and progress.validation_pending
        if step < progress.global_step or (step == progress.global_step and not pending):
            yield line


_SHOWN = ("val_loss", "val_class_loss", "val_kl", "val_kl_cells", "val_top1_agreement")
