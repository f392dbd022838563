"""The programs of a run: training, then evaluation, each by the stock ``tune run``.

A program that ends with 2 has a mistake in its config, with 75 it was asked to stop; anything else but 0 is a failure.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.errors import MISTAKE_FILE, Stopped, UserError
from torchtune_kd.reports.logs import read_log
from torchtune_kd.reports.results import Result, read_results
from torchtune_kd.sweeps.runs import Run

MISTAKE, STOPPED = UserError.exit_code, Stopped.exit_code
_SHOWN = 12  # lines of a failed program's output that are kept with the failure


@dataclass
class Program:
    """A program of a run that is under way.

    Attributes:
        process (subprocess.Popen): it.
        log (Path): where its output goes.
        mistake (Path): file that it writes where its config or files cannot be.
        begin (int): bytes of the log that are of earlier programs.
        peak_bytes (int): the largest resident set of the program that was seen, of its first process where it has
            several.
    """

    process: subprocess.Popen
    log: Path
    mistake: Path
    begin: int = 0
    peak_bytes: int = 0

    def poll(self) -> int | None:
        """Return the exit code, None while it runs; torchrun ends with 1 whatever its workers end with."""
        code = self.process.poll()
        with contextlib.suppress(OSError):  # it has ended, or the system has no /proc
            lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
            self.peak_bytes = max(
                [self.peak_bytes, *(1024 * int(line.split()[1]) for line in lines if "VmHWM" in line)]
            )
        return MISTAKE if code == 1 and self.mistake.is_file() else code

    def stop(self) -> None:
        """Ask the program to stop: a run writes a checkpoint first."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def last_words(self) -> str:
        """Return its sentence, if its output ends with one, else its last lines."""
        with self.log.open("rb") as file:
            file.seek(self.begin)
            text = file.read().decode(errors="replace")
        lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n") if line.strip()]
        said = [line for line in lines if line.startswith(("error: ", "stopped: "))]
        return said[-1].partition(": ")[2] if said else "\n".join(lines[-_SHOWN:])


def start(
    recipe: str,
    config: DictConfig,
    folder: Path,
    name: str,
    *,
    devices: int = 1,
    visible: str | None = None,
    threads: int | None = None,
    locked: Sequence[int],
) -> Program:
    """Start ``tune run`` on a config, which is written beside its output.

    Args:
        recipe (str): as ``tune run`` takes it.
        config (DictConfig): the program's.
        folder (Path): for ``<name>.yaml`` and ``<name>.log``.
        name (str): of these files.
        devices (int): processes; more than one by torchrun.
        visible (str | None): CUDA_VISIBLE_DEVICES; None leaves it.
        threads (int | None): OMP_NUM_THREADS where the environment sets none.
        locked (Sequence[int]): descriptors of locks, of the run first, which the program holds as long as it lives.
    """
    path = folder / f"{name}.yaml"
    OmegaConf.save(config, path)  # as it is written: a name that only `${name}` reads is a key
    spread = ["--nproc_per_node", str(devices), "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    launch = [sys.executable, "-m", "torchtune_kd", "run", *(spread if devices > 1 else [])]
    mistake = folder / f"{name}.mistake"
    mistake.unlink(missing_ok=True)
    environment = dict(os.environ) | {MISTAKE_FILE: str(mistake)}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take the others' cores
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    log = folder / f"{name}.log"
    begin = log.stat().st_size if log.is_file() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*launch, recipe, "--config", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=locked,
            start_new_session=True,  # Ctrl-C reaches the sweep, which asks its programs to stop
        )
    return Program(process, log, mistake, begin)


def training_lines(run: Run, devices: int, peak_bytes: int) -> Iterator[Result]:
    """Yield what training took, on all of its devices together, and its last validation, from the log of a run.

    The peak of memory is that of a GPU, where the log has it, and else ``peak_bytes``.
    """
    steps, validations = read_log(run.output / "logs")
    peak = max((step.get("peak_memory_reserved", 0.0) * 2**30 for step in steps), default=0.0)  # torchtune logs GiB
    yield run.result("training", "training_steps", steps[-1]["step"])
    yield run.result("training", "training_tokens", steps[-1]["tokens_seen"])
    seconds = [devices * each for each in step_seconds(steps, devices)]
    of_teacher = sum(each * step.get("teacher_time_share", 0.0) for each, step in zip(seconds, steps, strict=True))
    yield run.result("training", "training_seconds", sum(seconds))
    yield run.result("training", "teacher_seconds", of_teacher)
    yield run.result("training", "student_seconds", sum(seconds) - of_teacher)
    if peak or peak_bytes:
        yield run.result("training", "peak_bytes", peak or peak_bytes)
    for name, value in (validations[-1] if validations else {}).items():
        if name != "step":
            yield run.result("validation", name.removeprefix("val_"), value)


def step_seconds(steps: Sequence[Mapping[str, float]], devices: int) -> list[float]:
    """Return how long each step of a log took, in seconds; 0 of one without a valid token, whose rate says nothing."""
    before = [0.0, *(step["tokens_seen"] for step in steps)]
    return [
        (step["tokens_seen"] - seen) / step["tokens_per_second_per_gpu"] / devices
        if step["tokens_seen"] > seen
        else 0.0
        for step, seen in zip(steps, before, strict=False)
    ]


def evaluated_lines(run: Run) -> list[Result]:
    """Return the lines of an evaluation as those of the run's cell, or of the models that no run trains."""
    lines = [replace(line, run=run.id, evaluation=run.evaluation_id) for line in read_results(run.evaluated_file)]
    if run.models != ("student",):
        return [replace(line, cell=line.model) for line in lines]
    cell = run.cell
    return [replace(line, cell=cell.name, coordinates=cell.coordinates, seed=run.seed) for line in lines]


def threads_of(slots: Sequence[str | None]) -> int:
    """Return how many threads each of so many runs at once gets on this machine."""
    return max(1, (os.cpu_count() or 1) // len(slots))
