"""Compare models with a baseline: results become tables of means, errors, paired differences and verdicts."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_kd.errors import UserError
from torchtune_kd.reports import statistics
from torchtune_kd.reports.comparable import FACTS, is_fact, latest, require_comparable, require_known
from torchtune_kd.reports.notes import coverage_notes, provenance
from torchtune_kd.reports.results import METRICS, Metric, Result
from torchtune_kd.reports.statistics import Interval

SCHEMA = 1
SIGNIFICANT = 0.05
TIMES = ("training_seconds", "teacher_seconds", "student_seconds")  # of training: another machine's are left out


@dataclass(frozen=True)
class Difference:
    """A difference to the baseline.

    Attributes:
        value (float): of the means.
        items (Interval | None): by Student's t over paired items; None without items of both.
        resampled (tuple[float, float] | None): 95 % interval over the same items by the bootstrap.
        seeds (Interval | None): over seeds, unpaired, with the pooled spread; None without a second seed anywhere.
        p (float | None): the larger of the two p-values, since the difference has to hold against both.
        adjusted (float | None): that by Holm, over the table.
        verdict (str): "better", "worse", "higher", "lower", "not shown", or "not tested".
    """

    value: float
    items: Interval | None = None
    resampled: tuple[float, float] | None = None
    seeds: Interval | None = None
    p: float | None = None
    adjusted: float | None = None
    verdict: str = "not tested"

    @property
    def is_shown(self) -> bool:
        return not self.verdict.startswith("not")


@dataclass(frozen=True)
class Row:
    """Hold what one name reached in a table; ``seeds`` holds None for what was not trained."""

    name: str
    seeds: Sequence[int | None]
    values: Sequence[float]
    mean: float
    se_seeds: float | None
    se_items: float | None
    difference: Difference | None = None


@dataclass(frozen=True)
class Table:
    """One metric of one task, the baseline first: a family of comparisons."""

    task: str
    metric: str
    label: str
    unit: str
    better: int
    items: int
    reference: str | None
    seed_sd: float
    seed_dof: int
    rows: Sequence[Row]


@dataclass(frozen=True)
class Range:
    """Mean, least and largest of a figure over seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Facts:
    """Figures of one task, without a test: {name: {metric: range}}."""

    task: str
    metrics: Sequence[str]
    rows: Mapping[str, Mapping[str, Range]]
    machines: Sequence[str]
    loads: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """All tables, with what has to be said about them."""

    title: str
    baseline: str
    tables: Sequence[Table]
    facts: Sequence[Facts]
    coordinates: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]
    provenance: Mapping[str, Any]
    schema: int = SCHEMA

    def facts_of(self, task: str) -> Facts | None:
        """Return the first facts whose task begins with ``task``."""
        return next((facts for facts in self.facts if facts.task.startswith(task)), None)


def metric_of(name: str) -> Metric:
    """Return how a metric is printed; one of lm-eval's that we do not know is a plain number."""
    return METRICS.get(name, Metric(name, "", 0))


def compare(
    results: Iterable[Result],
    baseline: str,
    *,
    metrics: Sequence[str] | None = None,
    title: str = "Comparison",
    failures: Sequence[str] = (),
) -> Comparison:
    """Compare every name with the baseline.

    Args:
        results (Iterable[Result]): of any number of files; the last of a name, seed, task and metric counts.
        baseline (str): name of what the others are compared with.
        metrics (Sequence[str] | None): of quality and latency, those to show; None shows all.
        title (str): of the report.
        failures (Sequence[str]): a sentence for each run that failed, see :func:`.notes.read_failures`.

    Raises:
        UserError: for a name that is not there, and for what cannot be compared.
    """
    lines, replaced = latest(results)
    if not lines:
        raise UserError("There are no results in the files given: evaluate a model first.")
    require_known("baseline", baseline, (line.name for line in lines))
    for metric in metrics or ():
        require_known("metric", metric, (line.metric for line in lines))
    lines = [
        line
        for line in lines
        if not metrics or line.metric in metrics or (is_fact(line.task) and not line.task.startswith("latency "))
    ]
    require_comparable(lines)
    lines.sort(key=lambda line: line.name != baseline)  # stable: the baseline first, the rest in order of appearance
    quality: dict[tuple[str, str], list[Result]] = {}
    figures: dict[str, list[Result]] = {}
    for line in lines:
        if is_fact(line.task):
            figures.setdefault(line.task, []).append(line)
        else:
            quality.setdefault((line.task, line.metric), []).append(line)
    tables = [_table(group, baseline) for group in quality.values()]
    if tables and all(row.difference is None for table in tables for row in table.rows):
        raise UserError(
            f"Nothing can be compared with `{baseline}`: it shares no finite result with another model; evaluate it on "
            f"their tasks ({', '.join(dict.fromkeys(table.task for table in tables))})."
        )
    facts, left_out = _facts(figures)
    return Comparison(
        title=title,
        baseline=baseline,
        tables=tables,
        facts=facts,
        coordinates={line.name: dict(line.coordinates) for line in lines if line.coordinates},
        notes=[*failures, *left_out, *coverage_notes(lines, baseline, replaced)],
        provenance=provenance(lines),
    )


def write_comparison(comparison: Comparison, file: Path) -> None:
    """Write everything as JSON; what is no finite number is null."""
    file.write_text(json.dumps(_plain(asdict(comparison)), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _table(lines: Sequence[Result], baseline: str) -> Table:
    named: dict[str, list[Result]] = {}
    for line in lines:
        named.setdefault(line.name, []).append(line)
    groups = {
        name: sorted(group, key=lambda line: -1 if line.seed is None else line.seed) for name, group in named.items()
    }
    trained = [[line.value for line in group if line.seed is not None] for group in groups.values()]
    spread = statistics.pooled([values for values in trained if values and np.isfinite(values).all()])
    task, name = lines[0].task, lines[0].metric
    metric = metric_of(name)
    return Table(
        task=task,
        metric=name,
        label=metric.label,
        unit=metric.unit,
        better=metric.better,
        items=max(line.n for line in lines),
        reference=next((line.reference for line in lines if line.reference is not None), None),
        seed_sd=spread.sd,
        seed_dof=spread.dof,
        rows=_rows(groups, baseline, spread, metric.better),
    )


def _rows(groups: Mapping[str, Sequence[Result]], baseline: str, spread: statistics.Spread, better: int) -> list[Row]:
    items = {name: _mean_items(group) for name, group in groups.items()}
    weights = next((line.weights for group in groups.values() for line in group if line.weights is not None), None)
    rows = [_row(group, items[name], weights) for name, group in groups.items()]
    base = next((row for row in rows if row.name == baseline and math.isfinite(row.mean)), None)
    if base is None:
        return rows
    differences = {
        row.name: _difference(row, base, items[row.name], items[baseline], weights, spread)
        for row in rows
        if row.name != baseline and math.isfinite(row.mean)
    }
    paired = [name for name, difference in differences.items() if difference.items is not None]
    if paired:
        columns = [_paired(items[name], items[baseline]) for name in paired]
        ends = statistics.bootstrap(np.stack(columns, axis=1), weights)
        for name, (low, high) in zip(paired, ends.tolist(), strict=True):
            differences[name] = replace(differences[name], resampled=(low, high))
    tested = [name for name, difference in differences.items() if difference.p is not None]
    for name, adjusted in zip(tested, statistics.holm([differences[name].p for name in tested]), strict=True):
        differences[name] = _judged(replace(differences[name], adjusted=adjusted), better)
    return [replace(row, difference=differences.get(row.name)) for row in rows]


def _row(lines: Sequence[Result], items: np.ndarray | None, weights: Sequence[float] | None) -> Row:
    values = [line.value for line in lines]
    mean, se_seeds = statistics.over_seeds(values)
    if items is not None:
        _, se_items = statistics.over_items(items, weights)
    else:  # the seeds answered the same items, so that averaging over seeds takes little of this error away
        errors = [line.se for line in lines if line.se is not None]
        se_items = math.fsum(errors) / len(errors) if errors else None
    return Row(lines[0].name, [line.seed for line in lines], values, mean, se_seeds, se_items)


def _mean_items(lines: Sequence[Result]) -> np.ndarray | None:
    """Return each item's value averaged over seeds; None where a seed has none, or one that is not finite."""
    if any(line.items is None or len(line.items) != line.n for line in lines):
        return None
    mean = np.mean([np.array(line.items, dtype=float) for line in lines], axis=0)
    return mean if len(mean) and np.isfinite(mean).all() else None


def _difference(
    row: Row,
    base: Row,
    items: np.ndarray | None,
    base_items: np.ndarray | None,
    weights: Sequence[float] | None,
    spread: statistics.Spread,
) -> Difference:
    value = float(_paired(row.mean, base.mean))
    over_items = None
    if items is not None and base_items is not None:
        over_items = statistics.difference_over_items(_paired(items, base_items), weights)
    seeds = tuple(sum(seed is not None for seed in each.seeds) for each in (row, base))
    over_seeds = statistics.difference_over_seeds(value, seeds, spread)
    p_values = [interval.p for interval in (over_items, over_seeds) if interval is not None]
    return Difference(value, over_items, None, over_seeds, max(p_values, default=None))


def _paired(values: np.ndarray | float, base: np.ndarray | float) -> np.ndarray:
    """Return the differences; what is rounding alone is 0, since no standard error would cover it."""
    difference = np.subtract(values, base)
    return np.where(abs(difference) <= 1e-12 * np.maximum(np.abs(values), np.abs(base)), 0.0, difference)


def _judged(difference: Difference, better: int) -> Difference:
    """Give the verdict: a difference is shown where p, and with it both t intervals, and the bootstrap agree on it."""
    low, high = difference.resampled or (1.0, 1.0)
    if difference.adjusted >= SIGNIFICANT or low <= 0 <= high:
        return replace(difference, verdict="not shown")
    up, down = {1: ("better", "worse"), -1: ("worse", "better"), 0: ("higher", "lower")}[better]
    return replace(difference, verdict=up if difference.value > 0 else down)


def _facts(figures: Mapping[str, Sequence[Result]]) -> tuple[list[Facts], list[str]]:
    """Return the figures by task, and a sentence for what was left out."""
    found, notes = [], []
    for task in sorted(figures, key=lambda task: [task.startswith(kind) for kind in FACTS], reverse=True):
        lines = figures[task]
        machines = list(dict.fromkeys(line.machine for line in lines if line.machine))
        if task.startswith("training") and len(machines) > 1:
            notes.append(
                f"The seconds of training are left out: they were taken on different machines ({'; '.join(machines)})."
            )
            lines = [line for line in lines if line.metric not in TIMES]
        values: dict[str, dict[str, list[float]]] = {}
        for line in lines:
            values.setdefault(line.name, {}).setdefault(line.metric, []).append(line.value)
        order = [metric for metric in METRICS if any(metric in row for row in values.values())]
        order += [metric for row in values.values() for metric in row if metric not in METRICS]
        rows = {
            name: {metric: Range(math.fsum(each) / len(each), min(each), max(each)) for metric, each in row.items()}
            for name, row in values.items()
        }
        loads = sorted(line.load for line in lines if line.load is not None)
        found.append(Facts(task, list(dict.fromkeys(order)), rows, machines, loads))
    return found, notes


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
