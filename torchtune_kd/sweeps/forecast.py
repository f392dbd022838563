"""Forecast what a sweep takes: FLOPs by the plan of a run, and tokens, FLOPs and minutes of it all."""

import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from torchtune_kd.config.reading import read_config
from torchtune_kd.data.steps import build_loaders, steps_per_epoch
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError
from torchtune_kd.plan import plan_run
from torchtune_kd.plan import read_request as read_plan
from torchtune_kd.reports.logs import read_log
from torchtune_kd.reports.results import Result
from torchtune_kd.sweeps.locks import try_lock
from torchtune_kd.sweeps.processes import start, step_seconds, threads_of
from torchtune_kd.sweeps.request import Request
from torchtune_kd.sweeps.runs import Run, plan_runs

TIMED_STEPS = 4  # of which the first is left out: it is the slowest


class Flops:
    """Count FLOPs per token of teacher and student, by the plan of a run; each cell is planned once.

    They are those of tokens that count, in whole rows: what padding and masked prompts take comes on top. Teachers with
    ``datasets`` are taken to have equally many rows.
    """

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._known: dict[str, tuple[float, float]] = {}

    def per_token(self, run: Run) -> tuple[float, float]:
        """Return the FLOPs of all teachers' forwards, and of student, loss and update, for each token."""
        if run.cell.name not in self._known:
            written = copy.deepcopy(run.written)
            written.devices = self._devices
            plan = plan_run(*read_plan(written))
            tokens = plan.tokens_per_step / plan.layout.processes  # of one device, as the plan's FLOPs are
            teacher = plan.flops.get("teacher", 0)
            self._known[run.cell.name] = (teacher / tokens, (sum(plan.flops.values()) - teacher) / tokens)
        return self._known[run.cell.name]

    def lines(self, run: Run, tokens: float) -> Iterator[Result]:
        """Yield the FLOPs of a run on so many tokens, on all devices, as results."""
        for name, each in zip(("teacher_flops", "student_flops"), self.per_token(run), strict=True):
            yield run.result("training", name, each * tokens)


def forecast(request: Request) -> str:
    """Say how many runs a sweep has, what they take, and how long at the pace of a few timed steps on this machine.

    The tokens are those of the first run's rows. The minutes leave validation, evaluation and loading out of what
    they are multiplied by, and count what the timed run took beside its steps once for every run.
    """
    first, *later = plan_runs(request)
    points = len(first) // len(request.cells)
    runs = len(first) + len(later) * len(request.cells)
    steps, tokens = _length(request, first[0])
    seconds, start_up = _timed(request, first[0])
    flops = Flops(request.keys.devices_per_run)
    per_cell = {run.cell.name: flops.per_token(run) for run in first}
    shares = [(points + len(later)) * tokens * sum(per_cell[cell.name]) for cell in request.cells]
    teacher = sum((points + len(later)) * tokens * per_cell[cell.name][0] for cell in request.cells)
    open_runs = sum(not run.is_trained for run in first) + sum(
        not run.is_trained for runs_of_seed in later for run in runs_of_seed[::points]
    )
    slots = len(request.slots)
    minutes = open_runs * (steps * seconds + start_up) / slots / 60
    lines = [
        f"{len(request.cells)} cells x {len(request.keys.seeds)} seeds, {points} point{'s' * (points > 1)} to tune "
        f"over with the first seed: {runs} runs, {open_runs} of them open.",
        f"Each run: {steps:,} steps, {tokens:,.0f} tokens. All: {runs * tokens:,.0f} tokens, {sum(shares):.3g} FLOPs, "
        f"{teacher / sum(shares):.0%} of them the teacher's.",
        f"A timed step of the first run takes {seconds:.2f} s here, and {start_up:.0f} s pass beside the steps of a "
        f"run: {minutes:,.0f} minutes with {slots} run{'s' * (slots > 1)} at once, evaluation not counted.",
        "",
        *(f"  {run}" + ("" if not run.is_trained else " (trained)") for run in first),
    ]
    return "\n".join(lines)


def _length(request: Request, run: Run) -> tuple[int, float]:
    """Return optimizer steps and valid tokens of a run, on all of its devices."""
    config = read_config(run.written, distributed=request.distributed)
    settings, tokenizer = config.settings, config.tokenizer.build()
    longest = config.tokenizer.get("max_seq_len") or 2**31
    loader, _ = build_loaders(config, tokenizer, -100, longest, 2**31, settings.seed or 0, World(settings.torch_device))
    per_step = settings.gradient_accumulation_steps * request.keys.devices_per_run  # batches
    steps = settings.epochs * steps_per_epoch(loader, per_step, settings.max_steps_per_epoch)
    rows = min(steps * settings.batch_size * per_step, settings.epochs * len(loader.dataset))
    sample = [loader.dataset[index] for index in range(min(100, len(loader.dataset)))]
    valid = sum(sum(label != -100 for label in row["labels"][1:]) for row in sample) / len(sample)
    return steps, rows * float(valid)


def _timed(request: Request, run: Run) -> tuple[float, float]:
    """Train a few steps in a folder of their own; return the seconds of a step, and those beside the steps."""
    with tempfile.TemporaryDirectory() as scratch, try_lock(Path(scratch) / ".lock") as locked:
        written = copy.deepcopy(run.written)
        written.max_steps_per_epoch, written.epochs = TIMED_STEPS, 1
        written.output_dir, written.resume_from_checkpoint = scratch, False
        written.metric_logger.log_dir = f"{scratch}/logs"
        began = time.monotonic()
        program = start(
            request.keys.run_recipe,
            OmegaConf.create(OmegaConf.to_container(written)),
            Path(scratch),
            "timed",
            devices=request.keys.devices_per_run,
            visible=request.slots[0],
            threads=threads_of(request.slots),
            locked=[locked],
        )
        try:
            code = program.process.wait()
        finally:
            program.stop()
        elapsed = time.monotonic() - began
        if code:
            raise UserError(f"The first run, {run}, cannot be run: {program.last_words()}")
        steps, _ = read_log(Path(scratch) / "logs")
    times = step_seconds(steps, request.keys.devices_per_run)
    return sum(times[1:]) / max(len(times) - 1, 1), elapsed - sum(times)
