"""The results of an evaluation as text."""

from collections.abc import Sequence

from torchtune_kd.reports.results import METRICS, Metric, Result


def as_table(results: Sequence[Result], models: Sequence[str]) -> str:
    """Return one row for each metric of each task and one column for each model, with standard errors over items."""
    found = {(result.task, result.metric, result.model): result for result in results}
    rows = [["", *models]]
    tasks = dict.fromkeys(result.task for result in results)
    for task in tasks:
        rows.append([task])
        for metric in dict.fromkeys(result.metric for result in results if result.task == task):
            cells = [found.get((task, metric, model)) for model in models]
            label, unit, _ = METRICS.get(metric, Metric(metric, "", 0))
            suffix = f", {unit}" if unit not in ("", "share") else ""
            rows.append([f"  {label}{suffix}", *(_cell(cell) for cell in cells)])
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(models) + 1)]
    lines = []
    for number, row in enumerate(rows):
        first, *rest = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False))]
        lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("─" * (sum(widths) + 2 * len(models)))
    return "\n".join(lines)


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    value = _number(result.value)
    return value if result.se is None else f"{value} ± {_number(result.se)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e13 else f"{value:.3g}"
