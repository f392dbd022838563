"""The loss benchmark with the peers that are installed: what :mod:`benchmarks.losses` measures, within the time."""

from typing import Any

from ..losses._case import Case, plan
from ..losses._cell import Cell
from ..losses._counts import Rates
from ..losses._report import HOW_TO_READ, case_table, footnotes, target_table
from ..losses._run import Clock, Result, run_cases
from ._job import Emit, Job, Row, Skip
from .kernels import backend_of

TITLE = "The losses and their peers"
PARTS = ("",)
SECONDS_PER_CELL = 0.3
# few and small, of both operations
_REHEARSED = (
    Case(tokens=8, vocab=300),
    Case(op="linear", tokens=8, vocab=300, widths=(32, 64), ignored=0.5),
)


def run(job: Job, emit: Emit) -> None:
    """Measure case after case, those with a target first, ours in all of them before the peers; each is a row."""
    if "copy_bytes" not in job.facts:
        raise Skip("the rates of the device are not known, see the first section")
    cases = list(_REHEARSED if job.rehearse else plan(job.device))
    words = ["ours-torch", f"ours-{backend_of(job)[0]}"] if job.rehearse else None
    emit({"planned": len(cases)})

    def progress(result: Result) -> None:
        emit({"case": result.case._asdict(), "cells": [cell._asdict() for cell in result.cells]})

    budget = 0.0 if job.rehearse else SECONDS_PER_CELL
    run_cases(cases, job.device, words, budget, Clock(job.seconds), progress, apart=False)


def results(rows: list[Row]) -> list[Result]:
    """Return the measured cases, each with what was found last."""
    found = {}
    for row in rows:
        if "case" in row:
            case = Case(**row["case"] | {"widths": tuple(row["case"]["widths"])})
            found[case] = Result(case, [Cell(**cell | {"notes": tuple(cell["notes"])}) for cell in row["cells"]])
    return list(found.values())


def problems(rows: list[Row]) -> list[str]:
    """Return a line for each of our own calls that failed."""
    return [
        f"{result.case.name}: {cell.key} {cell.missing}"
        for result in results(rows)
        for cell in result.cells
        if cell.key.startswith("ours") and (cell.missing or "").startswith(("failed", "out of memory"))
    ]


def render(rows: list[Row], facts: dict[str, Any]) -> str:
    """The targets, a table a case, the footnotes."""
    measured = [result for result in results(rows) if any(cell.seconds for cell in result.cells)]
    if not measured:
        return "No case was measured."
    rates = Rates(facts["copy_bytes"], facts["matrix_flops"], facts.get("instructions"))
    device = "cuda" if facts.get("name") else "cpu"
    parts = [f"{HOW_TO_READ} `python -m benchmarks.losses --help` says more."]
    if device == "cuda":
        parts.append(target_table(measured, device, rates))
    parts += [case_table(result, rates) for result in measured]
    left_out = sum(row.get("planned", 0) for row in rows) - len(measured)
    if left_out:
        parts.append(f"{left_out} more cases were not reached; `python -m benchmarks.losses` runs them all.")
    return "\n\n".join([*parts, footnotes(measured) or ""]).rstrip()
