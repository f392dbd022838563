"""The files of a whole sweep, put together from those of its runs.

``results.jsonl`` holds the lines of every run that counts, ``tuned.jsonl`` what was trained only to choose,
``curves.jsonl`` the learning curves, ``failed.jsonl`` what failed. Given the first three, another machine goes on
with the sweep.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtune_kd.reports.logs import read_log
from torchtune_kd.reports.results import Result, read_results, to_lines
from torchtune_kd.storage.atomic import write_text
from torchtune_kd.sweeps.locks import lock
from torchtune_kd.sweeps.request import Request
from torchtune_kd.sweeps.runs import Run, chosen_runs

RESULTS, TUNED, CURVES, FAILED = "results.jsonl", "tuned.jsonl", "curves.jsonl", "failed.jsonl"
_CURVES = ("val_kl", "val_class_loss", "val_loss", "val_top1_agreement")
_OF_TRAINING = ("training", "validation")  # tasks


def write_trained(run: Run, lines: list[Result], *, evaluates: bool) -> None:
    """Record that a run is trained; where nothing is evaluated, also that it is done."""
    _write_curves(run)
    if not evaluates:
        write_text(run.results_file, to_lines(lines))
    write_text(run.trained_file, to_lines(lines))


def write_done(run: Run, evaluated: list[Result]) -> None:
    """Record that a run is done, with the lines of its training and of its evaluation."""
    trained = read_results(run.trained_file) if run.trained_file.is_file() else []
    write_text(run.results_file, to_lines([*trained, *map(_shortened, evaluated)]))
    run.evaluated_file.unlink()


def write_all(request: Request, seeds: Sequence[Sequence[Run]], models: Run | None) -> list[Result]:
    """Write the files of the sweep, each whole at any moment, and return the lines that count."""
    runs = [run for of_seed in seeds for run in of_seed]
    with lock(request.folder / ".lock"):
        chosen = chosen_runs(request, seeds)  # in here: who writes last has seen what was done before
        counting = [*([models] if models is not None else []), *(run for run in runs if run.id in chosen)]
        results = [line for run in counting if run.is_done for line in read_results(run.results_file)]
        write_text(request.folder / RESULTS, to_lines(results))
        others = [run for run in runs if run.trained_file.is_file() and not (run.id in chosen and run.is_done)]
        points = {run.id: {**run.cell.coordinates, **run.point} for run in others}
        tuned = [line for run in others for line in read_results(run.trained_file)]
        tuned = [replace(line, coordinates=points[line.run]) for line in tuned]
        write_text(request.folder / TUNED, to_lines(tuned))
        _write_lines(_curves_of(runs), request.folder / CURVES)
        failed = ({"run": run.id, "name": str(run), **run.failure} for run in runs if run.failure is not None)
        _write_lines(failed, request.folder / FAILED)
    return results


def adopt(request: Request, runs: Iterable[Run]) -> None:
    """Take over runs that are in the sweep's files and have no folder here: they were done on another machine."""
    with lock(request.folder / ".lock"):
        found: dict[str, list[Result]] = {}
        for name in (RESULTS, TUNED):
            file = request.folder / name
            for line in read_results(file) if file.is_file() else []:
                found.setdefault(str(line.run), []).append(line)
        curves = _read_lines(request.folder / CURVES)
        for run in runs:
            lines = [replace(line, coordinates=run.cell.coordinates) for line in found.get(run.id, [])]
            if not lines or run.trained_file.is_file() or run.is_done:
                continue
            _write_lines([curve for curve in curves if curve["run"] == run.id], run.folder / CURVES)
            trained = [line for line in lines if line.task in _OF_TRAINING]
            evaluated = [line for line in lines if line.evaluation is not None]
            if not evaluated and not request.keys.evaluate:
                write_text(run.results_file, to_lines(trained))
            elif evaluated and {line.evaluation for line in evaluated} == {run.evaluation_id}:
                write_text(run.results_file, to_lines(lines))
            if trained:
                write_text(run.trained_file, to_lines(trained))


def not_needed(request: Request, seeds: Sequence[Sequence[Run]]) -> list[Run]:
    """Return the runs with weights on the disk that nothing will read: those done, and those that were not chosen."""
    chosen = chosen_runs(request, seeds)
    decided = {run.cell.name for run in seeds[0] if run.id in chosen}
    return [
        run
        for runs in seeds
        for run in runs
        if run.is_trained and (run.is_done or (run.cell.name in decided and run.id not in chosen)) and run.has_weights
    ]


def _write_curves(run: Run) -> None:
    _, validations = read_log(run.output / "logs")
    curves = []
    for name in _CURVES:
        points = [[record["step"], record[name]] for record in validations if name in record]
        if points:
            curves.append({"run": run.id, "cell": run.cell.name, "seed": run.seed, "metric": name, "points": points})
    _write_lines(curves, run.folder / CURVES)


def _curves_of(runs: Iterable[Run]) -> Iterable[dict[str, Any]]:
    for run in runs:
        yield from _read_lines(run.folder / CURVES)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] if file.is_file() else []


def _write_lines(lines: Iterable[dict[str, Any]], file: Path) -> None:
    write_text(file, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def _shortened(line: Result) -> Result:
    """Round items to 6 digits: they are many, and none is known better."""
    return line if line.items is None else replace(line, items=[float(f"{item:.6g}") for item in line.items])
