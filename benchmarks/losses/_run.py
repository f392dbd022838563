"""All cells of a plan: in this process on a GPU, each in a process of its own on a CPU unless told otherwise."""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ._case import Case
from ._cell import Cell, measure_cell
from ._implementations import IMPLEMENTATIONS, Implementation
from ._inputs import Inputs, Truth, fp64_truths, make_inputs

CHECKOUT = Path(__file__).resolve().parents[2]
GRACE = 20.0  # seconds kept back for the cell that is running when the time is up
MOST_CHECKED = 16384  # tokens of a case that is compared with fp64
FIRST = ("ours-triton",)  # measured in all cases before anything else, on a GPU
LATE = "not run: the time of this run was up"


class Result(NamedTuple):
    """One case and everyone's numbers."""

    case: Case
    cells: list[Cell]

    def cell(self, key: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.key == key), None)

    @property
    def ours(self) -> Cell | None:
        """Ours with numbers, Triton before torch."""
        cells = (self.cell("ours-triton"), self.cell("ours-torch"))
        return next((cell for cell in cells if cell and cell.seconds), None)


class Clock:
    """Seconds left of a run, and why there are none."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.reason = LATE

    def left(self) -> float:
        return self._end - time.monotonic()

    def stop(self, reason: str) -> None:
        self._end, self.reason = time.monotonic(), reason


def select(case: Case, words: list[str] | None, device: str) -> list[Implementation]:
    """Implementations that fit a case and hold one of the words; on a GPU the slow ones last, should time run out."""
    fitting = [one for one in IMPLEMENTATIONS if one.fits(case)]
    wanted = [one for one in fitting if not words or any(word in one.key for word in words)]
    return sorted(wanted, key=lambda one: one.slow and device == "cuda")


def run_cases(
    cases: list[Case],
    device: str,
    words: list[str] | None,
    budget: float,
    clock: Clock,
    progress: Callable[[Result], None],
    apart: bool | None = None,
) -> list[Result]:
    """Measure cases in their order, on a GPU ours in all of them first, then everyone else's.

    Peers that compile for each shape take most of the time, and without this order much of ours would not be reached.

    Args:
        progress (Callable[[Result], None]): called with what was measured of a case, on a GPU twice.
        **others: as for :func:`run_case`.
    """
    results: dict[Case, Result] = {}
    for sweep in (FIRST, None) if device == "cuda" else (None,):
        for case in cases:
            earlier = results.get(case)
            results[case] = run_case(case, device, words, budget, clock, apart, sweep, earlier)
            if sweep is None or results[case].cells:
                progress(results[case])
    return list(results.values())


def run_case(
    case: Case,
    device: str,
    words: list[str] | None,
    budget: float,
    clock: Clock,
    apart: bool | None = None,
    keys: tuple[str, ...] | None = None,
    earlier: Result | None = None,
) -> Result:
    """Measure a case; cells for which no time is left, or that cannot run here, say so.

    Args:
        case (Case): what to compute.
        device (str): ``cuda`` or ``cpu``.
        words (list[str] | None): only implementations that hold one of them.
        budget (float): seconds to repeat a cell for.
        clock (Clock): of the whole run.
        apart (bool | None): a process of its own for each cell; None: on a CPU.
        keys (tuple[str, ...] | None): only these implementations.
        earlier (Result | None): what was measured of the case already, and is not again.
    """
    done = {} if earlier is None else {cell.key: cell for cell in earlier.cells}
    every = [one for one in select(case, words, device) if keys is None or one.key in keys]
    candidates = [one for one in every if one.key not in done]
    reasons = {one.key: one.missing(device, case) for one in candidates}
    runnable = [one for one in candidates if reasons[one.key] is None]
    measured: dict[str, Cell] = dict(done)
    if runnable and clock.left() > 0:
        try:
            apart = device != "cuda" if apart is None else apart
            with _measurer(case, device, runnable, budget, clock, apart) as measurer:
                for one in runnable:
                    measured[one.key] = measurer(one) if clock.left() > 0 else Cell(one.key, clock.reason)
        except torch.cuda.OutOfMemoryError:
            reasons.update({one.key: "out of memory for the inputs" for one in runnable})
    return Result(case, [measured.get(one.key) or Cell(one.key, reasons[one.key] or clock.reason) for one in every])


@contextmanager
def _measurer(
    case: Case, device: str, implementations: list[Implementation], budget: float, clock: Clock, apart: bool
) -> Iterator[Callable[[Implementation], Cell]]:
    """Return what measures one implementation after another on the same inputs."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    inputs = make_inputs(case, device)
    truths = _truths(inputs, case, implementations)
    if not apart:
        yield lambda one: _in_this_process(one, case, inputs, truths.get(_truth_key(one, case)), budget, clock)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        plain = {key: tuple(truth) for key, truth in truths.items()}
        torch.save({"inputs": tuple(inputs), "truths": plain}, path / "inputs.pt")
        inputs = None  # the processes read theirs from the file
        yield lambda one: _in_process(one, case, path, budget, clock)


def _truths(inputs: Inputs, case: Case, implementations: list[Implementation]) -> dict[str, Truth]:
    """The truth of every objective that one of the implementations computes; none for memory alone."""
    if case.tokens > MOST_CHECKED:
        return {}
    effective = {_truth_key(one, case): one.effective(case) for one in implementations}
    return dict(zip(effective, fp64_truths(inputs, list(effective.values())), strict=True))


def _truth_key(implementation: Implementation, case: Case) -> str:
    return implementation.effective(case).name


def _in_this_process(
    one: Implementation, case: Case, inputs: Inputs, truth: Truth | None, budget: float, clock: Clock
) -> Cell:
    cell = measure_cell(one, inputs, truth, case, budget)
    if cell.missing and inputs.student.is_cuda:
        try:
            torch.cuda.synchronize()
        except Exception:  # an illegal access: nothing more runs on the GPU in this process
            clock.stop(f"not run: {one.key} left the GPU unusable in '{case.name}'; rerun without it")
    return cell


def _in_process(one: Implementation, case: Case, folder: Path, budget: float, clock: Clock) -> Cell:
    job = {
        "key": one.key,
        "case": case._asdict(),
        "truth": _truth_key(one, case),
        "inputs": str(folder / "inputs.pt"),
        "output": str(folder / f"{one.key}.json"),
        "budget": budget,
    }
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.losses._worker", str(job_file)]
    limit = max(10.0, clock.left() + GRACE / 2)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT, timeout=limit)
    except subprocess.TimeoutExpired:
        return Cell(one.key, f"not finished: stopped after {limit:.0f} s, when the time of this run was up")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Cell(one.key, f"failed with exit code {done.returncode}: {last[:160]}")
    return Cell(**json.loads(Path(job["output"]).read_text()))
