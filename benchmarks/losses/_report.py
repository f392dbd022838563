"""The tables of a run: on the terminal, as Markdown and as JSON, with device, versions and command."""

import json
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from ._cell import Cell
from ._counts import Rates, bound, bound_of, work
from ._implementations import LACKS
from ._run import CHECKOUT, Result
from ._targets import targets

_HEADS = (
    "implementation",
    "time",
    "host",
    "GB",
    "TFLOP",
    "instr/logit",
    "bound",
    "reached",
    "of need",
    "vs ours",
    "extra MiB",
    "loss err",
    "grad err",
    "calls",
    "notes",
)


class Setting(NamedTuple):
    """On what and how a run was made."""

    device: str  # type
    description: str
    versions: dict[str, str]
    command: str
    rates: Rates
    started: datetime


def now() -> datetime:
    return datetime.now(timezone.utc)


def commit() -> str:
    """Short name of the commit of this checkout, with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=CHECKOUT)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        name = git("rev-parse", "--short", "HEAD")
        return (name or "unknown") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return "unknown"


def markdown_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well as plain text."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(heads), line(tuple("-" * width for width in widths)), *(line(row) for row in rows)])


def letter(name: str) -> str:
    """The footnote of a lack."""
    return "abcdefghijklmnopqrstuvwxyz"[list(LACKS).index(name)]


HOW_TO_READ = (
    "`GB` and `TFLOP` are what the case needs, whoever computes it; `instr/logit` what our kernel issues, counted in "
    "its machine code. `bound` is the longest of the times to move the bytes and to compute the products at the "
    "measured rates, and to issue the instructions; `reached` is the bound over the time. `of need` is the same for "
    "bytes and products alone, which code that keeps no row on chip cannot do without: targets are stated in it. "
    "`vs ours` is the time over that of ours-triton, or of ours-torch where that did not run. `host` is, on a GPU, the "
    "time until a call comes back: where it is the longer one, the device waits for the host. On a CPU it adds up all "
    "threads, and where it is below `time`, others kept the machine busy."
)


def case_table(result: Result, rates: Rates) -> str:
    """One case: what ran, then in one line each what did not and why."""
    needed, least = work(result.case), bound(result.case, rates)
    head = (
        f"**{result.case.name}**: needs {needed.bytes / 1e9:.3g} GB and {needed.flops / 1e12:.3g} TFLOP, at least "
        f"{_time(least.seconds)} ({least.of})"
    )
    rows = [_row(cell, result, rates) for cell in result.cells if cell.seconds]
    reasons: dict[str, list[str]] = {}
    for cell in result.cells:
        if not cell.seconds:
            reasons.setdefault(cell.missing, []).append(cell.key)
    missing = [f"- {', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
    parts = [head, markdown_table(_HEADS, rows) if rows else "", "\n".join(missing)]
    return "\n\n".join(part for part in parts if part)


def _row(cell: Cell, result: Result, rates: Rates) -> tuple[str, ...]:
    needed, least, ours = work(result.case), bound(result.case, rates), result.ours
    largest = bound_of(result.case, rates, cell.instructions)
    host = cell.host_seconds if cell.cpu_seconds is None else cell.cpu_seconds
    return (
        cell.key,
        _time(cell.seconds),
        "-" if host is None else _time(host),
        f"{needed.bytes / 1e9:.3g}",
        f"{needed.flops / 1e12:.3g}" if needed.flops else "-",
        "-" if cell.instructions is None else f"{cell.instructions:.1f}",
        f"{_time(largest.seconds)} {largest.of}",
        f"{largest.seconds / cell.seconds:.0%}",
        f"{least.seconds / cell.seconds:.0%}",
        f"{cell.seconds / ours.seconds:.2f}x" if ours else "-",
        f"{cell.extra_bytes / 2**20:.0f}",
        "-" if cell.loss_error is None else f"{cell.loss_error:.1e}",
        "-" if cell.gradient_error is None else f"{cell.gradient_error:.1e}",
        str(cell.repeats),
        " ".join(letter(name) for name in cell.notes),
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def footnotes(results: list[Result]) -> str:
    """Explain the letters of the notes, those in use."""
    used = {name for result in results for cell in result.cells for name in cell.notes}
    return "\n".join(f"- {letter(name)}: {text}" for name, text in LACKS.items() if name in used)


def target_table(results: list[Result], device: str, rates: Rates) -> str:
    rows = [tuple(target) for target in targets(results, device, rates)]
    return markdown_table(("target", "wanted", "measured", "verdict"), rows)


def heading(setting: Setting) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    rates = setting.rates
    return (
        f"{setting.description}\n\n{versions}\n\n"
        f"copy {rates.copy_bytes / 1e9:.4g} GB/s, bf16 products {rates.matrix_flops / 1e12:.4g} TFLOP/s"
        + (f", {rates.instructions / 1e9:.4g} billion instructions of a warp per second" if rates.instructions else "")
    )


def markdown(setting: Setting, results: list[Result]) -> str:
    """The whole report."""
    date = setting.started.strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f"# Distillation losses, {date}",
        f"`{setting.command}` at commit {commit()}",
        heading(setting),
        f"How to read it: `time` is the median. {HOW_TO_READ} `extra MiB` is the high-water mark above the inputs and "
        "the gradients returned; errors are against fp64. `benchmarks/losses/__init__.py` says more.",
        "## Targets",
        target_table(results, setting.device, setting.rates),
        "## Cases",
        *(case_table(result, setting.rates) for result in results),
        "## Notes",
        footnotes(results) or "none",
    ]
    return "\n\n".join(parts) + "\n"


def as_json(setting: Setting, results: list[Result]) -> dict:
    return {
        "date": setting.started.isoformat(timespec="seconds"),
        "command": setting.command,
        "commit": commit(),
        "device": setting.description,
        "versions": setting.versions,
        "rates": setting.rates._asdict(),
        "targets": [target._asdict() for target in targets(results, setting.device, setting.rates)],
        "cases": [
            {
                "name": result.case.name,
                "case": result.case._asdict(),
                "work": work(result.case)._asdict(),
                "bound": bound(result.case, setting.rates)._asdict(),
                "cells": [cell._asdict() for cell in result.cells],
            }
            for result in results
        ],
        "notes": LACKS,
    }


def write(setting: Setting, results: list[Result], folder: Path) -> list[Path]:
    """Both files, named by date and device."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in setting.description.split(",")[0].lower()).strip("-")
    stem = f"losses-{setting.started.strftime('%Y-%m-%d-%H%M')}-{name}"
    files = [folder / f"{stem}.md", folder / f"{stem}.json"]
    files[0].write_text(markdown(setting, results))
    files[1].write_text(json.dumps(as_json(setting, results), indent=1) + "\n")
    return files
