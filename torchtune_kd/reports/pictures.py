"""Draw the figures of a comparison as files (PNG) and as parts of a page (SVG)."""

import importlib.util
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchtune_kd.errors import UserError
from torchtune_kd.reports import plots
from torchtune_kd.reports.comparison import Comparison, Table
from torchtune_kd.reports.page import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b0c"  # of text and axes: near black in a PNG, and in a page the colour of the page's own text
_STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "torchtune_kd",  # equal figures are equal files
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Picture:
    """A figure as a file and as SVG, with one sentence that says what it shows."""

    file: Path
    svg: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """The figures of each table, by task and metric, those of the whole, and why others are missing."""

    of_tables: Mapping[tuple[str, str], list[Picture]]
    others: list[Picture]
    missing: list[str]


def read_curves(files: Iterable[Path], runs: Collection[str | None]) -> dict[str, plots.Curves]:
    """Read learning curves: {metric: {cell: [points of a seed]}}. A last line that a crash cut short is left out.

    A line is ``{"run": id, "cell": name, "seed": 0, "metric": "val_kl", "points": [[step, value], ...]}``.

    Args:
        files (Iterable[Path]): where they are.
        runs (Collection[str | None]): those that are compared; a curve of another run, which only tuned, is left out,
            and one without a run is taken.

    Raises:
        UserError: for a line that is something else.
    """
    found: dict[str, dict[str, dict[int, list[tuple[float, float]]]]] = {}
    for file in files:
        lines = file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                if content.get("run") is not None and content["run"] not in runs:
                    continue
                points = [(float(step), float(value)) for step, value in content["points"] if value is not None]
                found.setdefault(content["metric"], {}).setdefault(content["cell"], {})[content["seed"]] = points
            except (AttributeError, ValueError, TypeError, KeyError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    continue
                raise UserError(
                    f"Line {number} of {file} is no learning curve (cell, seed, metric, points): remove it."
                ) from error
    return {metric: {name: list(seeds.values()) for name, seeds in cells.items()} for metric, cells in found.items()}


def draw_pictures(comparison: Comparison, curves: Mapping[str, plots.Curves], folder: Path) -> Pictures:
    """Draw what the data allow into ``folder``; what they do not is said in ``missing``."""
    if importlib.util.find_spec("matplotlib") is None:
        return Pictures({}, [], ["No plots: matplotlib is not installed (pip install 'torchtune-kd[evaluate]')."])
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    of_tables: dict[tuple[str, str], list[Picture]] = {}
    others: list[Picture] = []
    with matplotlib.rc_context(_STYLE):
        for table in comparison.tables:
            of_tables[table.task, table.metric] = _of_table(table, comparison, folder)
        latency, size = comparison.facts_of("latency"), comparison.facts_of("size")
        firsts: dict[str, Table] = {}
        for table in comparison.tables:
            if table.better:
                firsts.setdefault(table.task, table)
        for table in firsts.values():
            caption = (
                f"{table.task}, {table.label}, over the time of a token. Bars: 95 % over items, and up to the 90th "
                "percentile of the time. Area: bytes of the weights. Dotted: what no other is both as fast and better "
                "than, errors left aside."
            )
            others += _saved(plots.pareto(table, latency, size), folder, "pareto", table.task, caption)
        for metric, cells in curves.items():
            caption = f"Learning curves, {metric}: mean over seeds, in a band from the least to the largest seed."
            others += _saved(plots.learning_curves(metric, cells), folder, "curves", metric, caption)
    names = [picture.file.name for group in (*of_tables.values(), others) for picture in group]
    reasons = {
        "forest": "No forest plot: no difference could be tested.",
        "heat": "No heat map: fewer than two keys of a grid vary among the models.",
        "pareto": "No plot of quality over latency: fewer than two models have both.",
        "curves": "No learning curves: there is no curves.jsonl beside the results.",
    }
    missing = [reason for kind, reason in reasons.items() if not any(name.startswith(kind) for name in names)]
    return Pictures(of_tables, others, missing)


def _of_table(table: Table, comparison: Comparison, folder: Path) -> list[Picture]:
    what = f"{table.task}, {table.label}"
    caption = (
        f"{what}: paired differences to {comparison.baseline}. Filled markers are shown to differ, hollow ones are not."
    )
    name = f"{table.task}-{table.metric}"
    pictures = _saved(plots.forest(table, comparison.baseline), folder, "forest", name, caption)
    error = "over seeds" if any(row.se_seeds for row in table.rows) else "over items"
    caption = f"{what}: means over the grid, with their standard error {error}."
    return pictures + _saved(plots.heat_map(table, comparison.coordinates), folder, "heat", name, caption)


def _saved(figure: "Figure | None", folder: Path, kind: str, name: str, caption: str) -> list[Picture]:
    """Write a figure, if there is one; return it as a list that holds it."""
    if figure is None:
        return []
    file = folder / f"{kind}-{re.sub(r'[^A-Za-z0-9_.]+', '-', name).strip('-')}.png"
    figure.savefig(file, dpi=150, facecolor="white")
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return [Picture(file, _inline(drawn.getvalue(), file.stem, caption), caption)]


def _inline(svg: str, name: str, caption: str) -> str:
    """Return SVG as a part of a page: in the page's colour, its names its own, without links to the outside."""
    drawing = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(plots.PAPER, "var(--paper)")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing))
    drawing = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", drawing)
    drawing = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", drawing)
    width, box = re.search(r'width="([\d.]+)pt"', drawing)[1], re.search(r'viewBox="([^"]*)"', drawing)[1]
    head = f'<svg role="img" aria-label="{escape(caption)}" viewBox="{box}" style="width: {float(width) / 72:.2f}in">'
    return re.sub(r"^<svg[^>]*>", lambda _: head, drawing)
