"""Say what a comparison's tables do not show: what is missing, what failed, and where the numbers come from."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torchtune_kd.errors import UserError
from torchtune_kd.reports.comparable import is_fact
from torchtune_kd.reports.results import Result

SAME_TOKENS = 0.01  # relative difference up to which cells are said to be trained on equally many


def read_failures(files: Iterable[Path]) -> list[str]:
    """Return a sentence for each run in a sweep's ``failed.jsonl``.

    Raises:
        UserError: for a line that is something else.
    """
    notes = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line:
                continue
            try:
                failure = json.loads(line)
                said = " ".join(str(failure["message"]).split()).rstrip(".")
                notes.append(f"Failed with exit code {failure['exit_code']}: `{failure['name']}` ({said}).")
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"Line {number} of {file} is no failed run (name, exit_code, message): remove it."
                ) from error
    return notes


def coverage_notes(lines: Sequence[Result], baseline: str, replaced: int) -> list[str]:
    """Return a sentence for each thing that a reader of the tables alone would not know."""
    quality = [line for line in lines if not is_fact(line.task)]
    seeds = sorted({line.seed for line in lines if line.seed is not None})
    notes = [_missing(lines, quality, seeds), _not_finite(quality), _unequal_tokens(lines, baseline)]
    if quality and len(seeds) == 1:
        notes.append(
            f"Every trained model has one seed ({seeds[0]}), so that differences are judged over items alone: another "
            "seed could turn each of them."
        )
    notes.append(_without_items(quality))
    if replaced:
        notes.append(f"{_counted(replaced, 'result was', 'results were')} measured again: the last one counts.")
    return [note for note in notes if note]


def provenance(lines: Sequence[Result]) -> dict[str, Any]:
    """Return machines, loads, commits, versions, configs and times of the results."""
    versions: dict[str, list[str]] = {}
    for line in lines:
        for package, version in line.versions.items():
            if version not in versions.setdefault(package, []):
                versions[package].append(version)
    loads = [line.load for line in lines if line.load is not None]
    times = sorted(line.time for line in lines if line.time)
    return {
        "results": len(lines),
        "machines": _distinct(line.machine for line in lines),
        "load": [min(loads), max(loads)] if loads else None,
        "time": [times[0], times[-1]] if times else None,
        "commits": _distinct(line.commit for line in lines),
        "versions": versions,
        "configs": _distinct(line.config for line in lines),
    }


def _missing(lines: Sequence[Result], quality: Sequence[Result], seeds: Sequence[int]) -> str | None:
    there = {(line.name, line.seed, line.task, line.metric) for line in lines}
    kinds = dict.fromkeys((line.task, line.metric) for line in quality)
    trained = dict.fromkeys((line.name, line.seed is not None) for line in lines)
    gaps: dict[tuple[str, str], list[int | None]] = {}
    for name, by_seed in trained:
        for seed in seeds if by_seed else (None,):
            absent = [f"{task} {metric}" for task, metric in kinds if (name, seed, task, metric) not in there]
            if absent:
                what = "nothing was" if len(absent) == len(kinds) else f"{', '.join(absent)} not"
                gaps.setdefault((name, what), []).append(seed)
    said = [
        f"`{name}`{_seeds([seed for seed in missing if seed is not None])} ({what} measured)"
        for (name, what), missing in gaps.items()
    ]
    return f"Missing, because a cell failed, was skipped or is not done: {'; '.join(said)}." if said else None


def _seeds(seeds: Sequence[int]) -> str:
    return f" seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""


def _not_finite(quality: Sequence[Result]) -> str | None:
    found = _distinct(
        f"`{line.name}`{_seeds([] if line.seed is None else [line.seed])} ({line.task} {line.metric})"
        for line in quality
        if not math.isfinite(line.value)
    )
    return f"No finite number, and so no mean and no difference: {'; '.join(found)}." if found else None


def _without_items(quality: Sequence[Result]) -> str | None:
    names: dict[str, dict[str, bool]] = {}
    for line in quality:
        of_table = names.setdefault(f"{line.task} {line.metric}", {})
        of_table[line.name] = of_table.get(line.name, False) or line.items is None
    found = [
        table + ("" if all(lacks.values()) else f" ({', '.join(f'`{name}`' for name in lacks if lacks[name])})")
        for table, lacks in names.items()
        if any(lacks.values())
    ]
    return f"Without items, so that seeds alone can judge: {', '.join(found)}." if found else None


def _unequal_tokens(lines: Sequence[Result], baseline: str) -> str | None:
    tokens: dict[str, list[float]] = {}
    for line in lines:
        if line.metric == "training_tokens":
            tokens.setdefault(line.name, []).append(line.value)
    if baseline not in tokens:
        return None
    means = {name: math.fsum(values) / len(values) for name, values in tokens.items()}
    other = [
        f"`{name}` ({mean:,.0f})"
        for name, mean in means.items()
        if abs(mean - means[baseline]) > SAME_TOKENS * means[baseline]
    ]
    if not other:
        return None
    return f"Not trained on as many tokens as `{baseline}` ({means[baseline]:,.0f}): {', '.join(other)}."


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
