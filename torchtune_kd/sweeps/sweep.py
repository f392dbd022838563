"""Work through a sweep's runs until each is done or has failed.

What is to be done follows from the files of the runs alone, so that a sweep can be killed and started again, and
several processes, on machines that see one folder, share it.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from torchtune_kd.errors import Stopped, UserError, say
from torchtune_kd.evaluation.provenance import moment
from torchtune_kd.reports.results import Result
from torchtune_kd.sweeps import collect
from torchtune_kd.sweeps.forecast import Flops
from torchtune_kd.sweeps.locks import try_lock
from torchtune_kd.sweeps.processes import MISTAKE, STOPPED, Program, evaluated_lines, start, threads_of, training_lines
from torchtune_kd.sweeps.request import Request
from torchtune_kd.sweeps.runs import Run, chosen_runs, plan_runs, run_of_models

POLL = 0.2  # seconds between two looks at the programs
OTHERS = 5.0  # seconds between two looks at runs that other processes work on


@dataclass
class Job:
    """A program of a run that this process has started, and what it holds meanwhile."""

    run: Run
    stage: str  # "train" or "evaluate"
    program: Program
    lock: contextlib.ExitStack
    bar: tqdm


class Sweep:
    """The state of a sweep: the runs, and the programs that this process has under way."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.models = run_of_models(request)
        self.seeds = plan_runs(request)
        self.jobs: list[Job | None] = [None] * len(request.slots)
        self.flops = Flops(request.keys.devices_per_run)
        self.stopping: str | None = None
        collect.adopt(request, self.all_runs())
        for run in self.all_runs() if request.keys.retry_failed else []:
            with try_lock(run.folder / ".lock") as free:  # not what another process has just recorded
                if free is not None:
                    run.failure_file.unlink(missing_ok=True)

    def all_runs(self) -> list[Run]:
        """Return every run that the sweep may come to."""
        models = [] if self.models is None else [self.models]
        return [*models, *(run for runs in self.seeds for run in runs)]

    def open_work(self) -> Iterator[tuple[Run, str]]:
        """Yield what can be done now, in order: all cells with the first seed, then with the next.

        A cell is trained with every point of the tuning grid and the first seed; the best point is evaluated, and
        trained with the other seeds.
        """
        if self.models is not None and not self.models.is_done and self.models.failure is None:
            yield self.models, "evaluate"
        chosen = chosen_runs(self.request, self.seeds)
        for runs in self.seeds:
            for run in runs:
                if run.failure is not None:
                    continue
                stage = self._stage(run, chosen, is_first=runs is self.seeds[0])
                if stage is not None:
                    yield run, stage

    def _stage(self, run: Run, chosen: set[str], *, is_first: bool) -> str | None:
        """Return what is to be done for a run: train, evaluate or nothing.

        Weights that are gone, on another machine or because the run did not count before, are trained again.
        """
        if run.id not in chosen:
            return "train" if is_first and not run.is_trained else None
        if run.is_done:
            return None
        return "evaluate" if run.is_trained and run.has_weights else "train"

    def counts(self) -> tuple[int, int]:
        """Return how many trainings are over, failed ones included, and how many there are."""
        first, *later = self.seeds
        chosen = chosen_runs(self.request, self.seeds)
        over = sum(run.is_trained or run.failure is not None for run in first)
        over += sum(run.id in chosen and (run.is_trained or run.failure is not None) for runs in later for run in runs)
        return over, len(first) + len(later) * len(self.request.cells)

    def work(self) -> None:
        """Run everything that is open.

        Raises:
            UserError: for a mistake before any run was trained.
            Stopped: after a signal, once the programs have ended.
        """
        with _signals(self), tqdm(unit="run", desc="sweep", dynamic_ncols=True) as bar:
            try:
                self._work(bar)
            except BaseException as error:
                self.stop(type(error).__name__)  # nothing goes on that nobody looks at
                raise

    def _work(self, bar: tqdm) -> None:
        counted = -OTHERS
        while True:
            ended = [self._look_at(slot, job) for slot, job in enumerate(self.jobs) if job is not None]
            if any(ended) or time.monotonic() > counted + OTHERS:  # others may have done some meanwhile
                (bar.n, bar.total), counted = self.counts(), time.monotonic()
                bar.refresh()
            if self.stopping:
                if not any(self.jobs):
                    raise Stopped(
                        f"{self.stopping} ended the sweep after {bar.n} of {bar.total} runs: start it again with the "
                        "same command to go on."
                    )
            elif not self._fill_slots() and not any(self.jobs):
                return
            time.sleep(POLL)

    def _fill_slots(self) -> bool:
        """Start programs in free slots; False if nothing is open, neither here nor with another process."""
        anything = False
        for slot, job in enumerate(self.jobs):
            if job is not None:
                continue
            work = list(self.open_work())
            anything = anything or bool(work)
            mine = {other.run.id for other in self.jobs if other is not None}
            if not any(self._start(slot, run, stage) for run, stage in work if run.id not in mine):
                break
        else:
            return True
        if anything and not any(self.jobs):  # others have it all
            time.sleep(OTHERS)
        return anything

    def _start(self, slot: int, run: Run, stage: str) -> bool:
        """Start a program if no other process works on its run, and none has done it meanwhile."""
        stack = contextlib.ExitStack()
        visible = self.request.slots[slot]
        descriptor = stack.enter_context(try_lock(run.folder / ".lock"))
        locks = [descriptor]
        if visible is not None:  # another sweep on this machine may have the same GPUs
            locks.append(
                stack.enter_context(try_lock(Path(tempfile.gettempdir()) / f"torchtune_kd_gpu_{visible}.lock"))
            )
        if None in locks or (run.id, stage) not in ((other.id, name) for other, name in self.open_work()):
            stack.close()
            return False
        run.evaluated_file.unlink(missing_ok=True)  # of an evaluation that was killed
        recipe, config = (
            (self.request.keys.run_recipe, run.written)
            if stage == "train"
            else ("torchtune_kd/evaluate", run.evaluation(self.request))
        )
        program = start(
            recipe,
            config,
            run.folder,
            stage,
            devices=self.request.keys.devices_per_run if stage == "train" else 1,
            visible=visible,
            threads=threads_of(self.request.slots),
            locked=locks,
        )
        bar = tqdm(
            total=run.total_steps,
            desc=f"{run} ({stage})",
            unit="step",
            position=slot + 1,
            leave=False,
            dynamic_ncols=True,
        )
        self.jobs[slot] = Job(run, stage, program, stack, bar)
        if self.stopping:  # the signal came while the program was being started
            program.stop()
        return True

    def _look_at(self, slot: int, job: Job) -> bool:
        """Follow a program's steps, and once it has ended, keep what it gave; True then."""
        code = job.program.poll()
        if code is None:
            job.bar.n = job.run.steps_done
            job.bar.refresh()
            return False
        self.jobs[slot] = None
        with job.lock:
            job.bar.close()
            if code == 0:
                self._keep(job)
            elif not self.stopping and code != STOPPED:
                self._fail(job, code)
        if self.request.keys.keep == "none":
            for run in collect.not_needed(self.request, self.seeds):
                with try_lock(run.folder / ".lock") as free:
                    if free is not None:
                        run.delete_weights()
        collect.write_all(self.request, self.seeds, self.models)
        return True

    def _keep(self, job: Job) -> None:
        run = job.run
        if job.stage == "train":
            lines = list(training_lines(run, self.request.keys.devices_per_run, job.program.peak_bytes))
            tokens = next(line.value for line in lines if line.metric == "training_tokens")
            lines += self.flops.lines(run, tokens)
            given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
            device = torch.device(run.written.get("device", "cuda"))
            where = moment(device, int(given or threads_of(self.request.slots)))
            lines = [replace(line, **where) for line in lines]
            collect.write_trained(run, lines, evaluates=bool(self.request.keys.evaluate))
        else:
            collect.write_done(run, evaluated_lines(run))

    def _fail(self, job: Job, code: int) -> None:
        """Record a failure; a mistake ends the sweep as long as no run was trained, since all would make it."""
        message = job.program.last_words()
        if code == MISTAKE and not any(run.is_trained for runs in self.seeds for run in runs):
            raise UserError(f"{job.run} cannot be run, and no run could before it, so the sweep ends here: {message}")
        job.run.write_failure(code, message)
        say(f"warning: {job.run} failed with exit code {code} and the sweep goes on; see {job.program.log}: {message}")

    def stop(self, reason: str) -> None:
        """Start nothing more, and ask the programs to stop: a run writes a checkpoint first."""
        self.stopping = self.stopping or reason
        for job in self.jobs:
            if job is not None:
                job.program.stop()


@contextlib.contextmanager
def _signals(sweep: Sweep) -> Iterator[None]:
    def ask(number: int, frame: FrameType | None) -> None:
        sweep.stop(signal.Signals(number).name)

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_sweep(request: Request) -> tuple[list[Result], list[Run], Path]:
    """Run a sweep to its end.

    Returns:
        tuple[list[Result], list[Run], Path]: the lines, the runs that failed, and the file of the lines.

    Raises:
        UserError: for a mistake in the config of a run, before any is started or by the first that is.
        Stopped: after SIGINT or SIGTERM.
    """
    sweep = Sweep(request)
    sweep.work()
    results = collect.write_all(request, sweep.seeds, sweep.models)
    return results, [run for run in sweep.all_runs() if run.failure is not None], request.folder / collect.RESULTS
