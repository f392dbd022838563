"""The tables of a comparison, once for all who print them: as Markdown, as HTML, and as text for a terminal."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from torchtune_kd.reports.comparison import Comparison, Facts, Range, Row, Table, metric_of
from torchtune_kd.reports.page import escape
from torchtune_kd.reports.statistics import Interval

NONE = "–"
MARKS = {"better": "+", "worse": "−", "higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Cell:
    """Text of a table, with the number it is sorted by; strong for a difference that is shown alone."""

    text: str
    value: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Grid:
    """A table: its caption, the heads of the columns, and rows of a name and cells."""

    caption: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def overview(comparison: Comparison, tables: Sequence[Table] | None = None) -> Grid:
    """Return every mean in one table, marked where its difference to the baseline is shown."""
    tables = comparison.tables if tables is None else tables
    names = dict.fromkeys(row.name for table in tables for row in table.rows)
    rows = []
    for name in names:
        cells = []
        for table in tables:
            row = next((row for row in table.rows if row.name == name), None)
            verdict = row.difference.verdict if row and row.difference and row.difference.is_shown else ""
            text = NONE if row is None else number(row.mean, decimals(table)) + f" {MARKS.get(verdict, '')}".rstrip()
            cells.append(Cell(text, row and row.mean, verdict))
        rows.append((name, cells))
    caption = (
        f"Means. + better and − worse than {comparison.baseline} (↑ ↓ where neither is), over items and over seeds; "
        "no mark: not shown to differ."
    )
    return Grid(caption, ["", *(f"{table.task} {table.metric}" for table in tables)], rows)


def quality_grid(table: Table, baseline: str) -> Grid:
    """Return every seed, mean, both standard errors, and the difference to the baseline with both intervals."""
    seeds = sorted({seed for row in table.rows for seed in row.seeds if seed is not None})
    digits = decimals(table)
    head = ["", *(f"seed\u00a0{seed}" for seed in seeds), "mean", "SE seeds", "SE items", f"minus {baseline}"]
    head += ["95 % over items", "95 % over seeds", "p (Holm)", "verdict"]
    rows = [(row.name, _quality_cells(row, seeds, digits, row.name == baseline)) for row in table.rows]
    return Grid(caption_of(table), head, rows)


def caption_of(table: Table) -> str:
    """Return one line that says what a table's numbers are."""
    said = [
        f"{table.metric}" + (f" in {table.unit}" if table.unit else ""),
        {1: "more is better", -1: "less is better", 0: ""}[table.better],
    ]
    said += [f"{table.items:,} items" if table.items else "", f"reference {table.reference}" if table.reference else ""]
    if table.seed_dof:
        spread = _error(table.seed_sd, decimals(table)).text
        said.append(f"standard deviation between seeds {spread}, pooled with {table.seed_dof} degrees of freedom")
    return "; ".join(filter(None, said))


def facts_grid(facts: Facts) -> Grid:
    """Return figures as means over seeds, with their range where seeds differ."""
    said = [f"On {', '.join(facts.machines)}" if facts.machines else ""]
    if facts.loads and facts.task.startswith(("latency", "training")):
        said.append("load " + " to ".join(dict.fromkeys(f"{load:.1f}" for load in (facts.loads[0], facts.loads[-1]))))
    said.append("means over seeds, with least and largest where seeds differ")
    rows = [
        (name, [_fact_cell(row.get(metric), metric_of(metric).unit) for metric in facts.metrics])
        for name, row in facts.rows.items()
    ]
    text = "; ".join(filter(None, said))
    return Grid(text[:1].upper() + text[1:], ["", *(metric_of(metric).label for metric in facts.metrics)], rows)


def as_markdown(grid: Grid) -> str:
    """Return the table in GitHub's Markdown."""
    lines = ["| " + " | ".join(map(_escaped, grid.head)) + " |", "|---" + "|---:" * (len(grid.head) - 1) + "|"]
    for name, cells in grid.rows:
        texts = [f"**{cell.text}**" if cell.verdict else cell.text for cell in cells]
        lines.append("| " + " | ".join([_escaped(name), *texts]) + " |")
    return "\n".join(lines)


def as_html(grid: Grid, label: str) -> str:
    """Return the table in a box of its own that scrolls, each head a button that sorts."""
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(head or "model")}</button></th>'
        for head in grid.head
    )
    rows = []
    for name, cells in grid.rows:
        tds = "".join(_html_cell(cell) for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{tds}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n<table class="sortable">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n</div>"
    )


def as_text(grid: Grid) -> str:
    """Return the table for a terminal: columns two spaces apart, numbers to the right."""
    lines = [list(grid.head), *([name, *(cell.text for cell in cells)] for name, cells in grid.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(grid.head))]
    return "\n".join(
        "  ".join(text.rjust(width) if column else text.ljust(width) for column, (text, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def si(value: float, unit: str = "") -> str:
    """Return a figure with three digits and a prefix of the SI: 162847400 bytes are 163 MB."""
    if not math.isfinite(value):
        return NONE
    if unit == "s":
        return f"{_three(value * 1e3)} ms" if 0 < value < 1 else f"{_three(value)} s"
    power = 0
    while abs(float(f"{value:.3g}")) >= 1000 and power < 6:
        value, power = value / 1000, power + 1
    name = {"bytes": "B", "FLOP": "FLOP", "tokens/s": "/s"}.get(unit, "")
    return f"{_three(value)} {' kMGTPE'[power].strip()}{name}".strip()


def _quality_cells(row: Row, seeds: Sequence[int], digits: int, is_baseline: bool) -> list[Cell]:
    by_seed = dict(zip(row.seeds, row.values, strict=True))
    cells = [_cell(by_seed.get(seed), digits) for seed in seeds]
    cells += [_cell(row.mean, digits), _error(row.se_seeds, digits), _error(row.se_items, digits)]
    difference = row.difference
    if difference is None:
        return [*cells, *[Cell(NONE)] * 4, Cell("baseline" if is_baseline else NONE)]
    verdict = difference.verdict if difference.is_shown else ""
    resampled, items = difference.resampled, difference.items
    cells.append(Cell(number(difference.value, digits, "+"), difference.value, verdict))
    cells.append(Cell(_ends(*resampled, digits), resampled[0]) if items and resampled else Cell(NONE))
    cells.append(_interval(difference.seeds, digits))
    p = difference.adjusted
    cells.append(Cell(NONE) if p is None else Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p))
    return [*cells, Cell(difference.verdict, None, verdict)]


def decimals(table: Table) -> int:
    """Return the decimals of a table: two digits of a usual standard error, or four of the largest value."""
    errors = [error for row in table.rows for error in (row.se_seeds, row.se_items) if error and math.isfinite(error)]
    values = [abs(row.mean) for row in table.rows if math.isfinite(row.mean) and row.mean]
    smallest, digits = (median_low(errors), 2) if errors else (max(values, default=1.0), 4)
    return min(6, max(0, digits - 1 - math.floor(math.log10(smallest))))


def _cell(value: float | None, digits: int) -> Cell:
    return Cell(NONE) if value is None or not math.isfinite(value) else Cell(number(value, digits), value)


def _error(value: float | None, digits: int) -> Cell:
    """Return a standard error with the decimals of its table, or by its first digit where these round it to 0."""
    cell = _cell(value, digits)
    return Cell(f"{value:.1g}", value) if cell.value and not float(cell.text.replace(",", "")) else cell


def number(value: float, digits: int, sign: str = "") -> str:
    if not math.isfinite(value):
        return NONE
    plain = f"{value:{sign},.{digits}f}" if abs(value) < 1e9 else f"{value:{sign}.3g}"
    return plain.replace("-", "−")


def _interval(interval: Interval | None, digits: int) -> Cell:
    return Cell(NONE) if interval is None else Cell(_ends(interval.low, interval.high, digits), interval.low)


def _ends(low: float, high: float, digits: int) -> str:
    return f"[{number(low, digits, '+')}, {number(high, digits, '+')}]"


def _fact_cell(found: Range | None, unit: str) -> Cell:
    if found is None:
        return Cell(NONE)
    low, high = si(found.low, unit), si(found.high, unit)
    return Cell(si(found.mean, unit) + ("" if low == high else f" ({low} to {high})"), found.mean)


def _three(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:#.3g}"


def _html_cell(cell: Cell) -> str:
    value = "" if cell.value is None or not math.isfinite(cell.value) else f' data-value="{cell.value!r}"'
    kind = f' class="{escape(cell.verdict)}"' if cell.verdict else ""
    return f"<td{value}{kind}>{escape(cell.text)}</td>"


def _escaped(text: str) -> str:
    return re.sub(r"([\\|*<`\[])", r"\\\1", " ".join(text.split()))
