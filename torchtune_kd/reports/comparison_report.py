"""Write a comparison for its readers: ``report.md`` with plots, one page ``report.html``, and ``comparison.json``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torchtune_kd.reports import tables
from torchtune_kd.reports.comparison import Comparison, write_comparison
from torchtune_kd.reports.page import escape, page
from torchtune_kd.reports.pictures import Picture, Pictures, draw_pictures
from torchtune_kd.reports.plots import Curves
from torchtune_kd.reports.statistics import RESAMPLES
from torchtune_kd.reports.tables import Grid

_STYLE = """
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; padding: 0; white-space: normal; background: var(--panel); }
thead th:not(:first-child) { max-width: 11rem; }
thead button {
  width: 100%; padding: .45rem .5rem; border: 0; background: none; color: inherit; font: inherit; font-weight: 600;
  text-align: inherit; cursor: pointer;
}
thead button:hover { color: var(--accent); }
thead button::after { content: "\\a0↕"; color: var(--soft); }
[aria-sort=ascending] button::after { content: "\\a0▲"; color: var(--accent); }
[aria-sort=descending] button::after { content: "\\a0▼"; color: var(--accent); }
thead button:focus-visible { outline-offset: -2px; }
tr > th:first-child { position: sticky; left: 0; text-align: left; background: var(--paper); }
thead tr > th:first-child { background: var(--panel); }
tbody th { font-weight: 500; min-width: 6rem; max-width: min(16rem, 40vw); }
tbody th { white-space: normal; overflow-wrap: break-word; }
tbody tr:hover > * { background: var(--panel); }
td.better, td.worse, td.higher, td.lower { font-weight: 700; }
td.better { color: var(--good); }
td.worse { color: var(--bad); }
figure svg { max-width: 100%; min-width: 34rem; height: auto; display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 0 2rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; max-width: none; padding: 0; list-style: none; }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(each => each.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows];
    const numeric = rows.some(row => row.cells[column].dataset.value !== undefined);
    const key = row => numeric ? row.cells[column].dataset.value : row.cells[column].textContent;
    rows.sort((one, other) => {
      const a = key(one), b = key(other);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);  // nothing measured: last
      return sign * (numeric ? a - b : a.localeCompare(b, undefined, {numeric: true}));
    });
    body.append(...rows);
  }));
}
"""


def write_report(comparison: Comparison, curves: Mapping[str, Curves], folder: Path) -> list[Path]:
    """Write tables, plots and both reports into ``folder``.

    Returns:
        list[Path]: report.md, report.html, comparison.json, and the plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(comparison, curves, folder / "plots")
    files = [folder / name for name in ("report.md", "report.html", "comparison.json")]
    files[0].write_text(as_markdown(comparison, pictures), encoding="utf-8")
    files[1].write_text(as_html(comparison, pictures), encoding="utf-8")
    write_comparison(comparison, files[2])
    drawn = [*pictures.of_tables.values(), pictures.others]
    return [*files, *(picture.file for group in drawn for picture in group)]


def as_markdown(comparison: Comparison, pictures: Pictures) -> str:
    """Return the report in Markdown; its plots are files beside it."""
    parts = [f"# {comparison.title}"]
    for section in _sections(comparison, pictures):
        parts.append(f"{'#' * section.level} {section.heading}")
        if section.grid is not None:
            parts += [section.grid.caption.rstrip(".") + ".", tables.as_markdown(section.grid)]
        for each in section.pictures:
            parts += [f"![{each.caption}]({each.file.parent.name}/{each.file.name})", each.caption]
        if section.sentences:
            parts.append("\n".join(f"- {sentence}" for sentence in section.sentences))
    return "\n\n".join(parts) + "\n"


def as_html(comparison: Comparison, pictures: Pictures) -> str:
    """Return the report as one page that needs nothing beside it."""
    parts, links = [], []
    for number, section in enumerate(_sections(comparison, pictures)):
        heading = escape(section.heading)
        links.append(f'<li><a href="#section-{number}">{heading}</a></li>')
        parts.append(f'<h{section.level} id="section-{number}">{heading}</h{section.level}>')
        if section.grid is not None:
            parts += [
                f'<p class="soft">{escape(section.grid.caption)}</p>',
                tables.as_html(section.grid, section.heading),
            ]
        figures = "\n".join(
            f'<figure>\n<div class="scroll" tabindex="0" role="region" aria-label="plot">{each.svg}</div>\n'
            f"<figcaption>{escape(each.caption)}</figcaption>\n</figure>"
            for each in section.pictures
        )
        items = "\n".join(f"<li>{_with_code(sentence)}</li>" for sentence in section.sentences)
        parts += [f'<div class="figures">\n{figures}\n</div>'] if figures else []
        parts += [f"<ul>\n{items}\n</ul>"] if items else []
    contents = f'<nav aria-label="Contents"><ul>\n{"".join(links)}\n</ul></nav>'
    return page(comparison.title, "\n".join([contents, *parts]), style=_STYLE, script=_SCRIPT)


class _Section(NamedTuple):
    """A part of the report: a heading and what stands below it."""

    level: int
    heading: str
    grid: Grid | None = None
    pictures: Sequence[Picture] = ()
    sentences: Sequence[str] = ()


def _sections(comparison: Comparison, pictures: Pictures) -> Iterable[_Section]:
    if comparison.tables:
        yield _Section(2, "Overview", tables.overview(comparison))
    notes = [*comparison.notes, *pictures.missing]
    if notes:
        yield _Section(2, "Remarks", sentences=notes)
    if comparison.tables:
        yield _Section(2, "Quality")
    for table in comparison.tables:
        drawn = pictures.of_tables.get((table.task, table.metric), [])
        yield _Section(3, f"{table.task}: {table.label}", tables.quality_grid(table, comparison.baseline), drawn)
    if comparison.facts:
        yield _Section(2, "Cost and speed")
    for facts in comparison.facts:
        yield _Section(3, facts.task, tables.facts_grid(facts))
    if pictures.others:
        yield _Section(2, "More plots", pictures=pictures.others)
    if comparison.tables:
        yield _Section(2, "How to read this", sentences=_explanations(comparison))
    yield _Section(2, "Where the numbers come from", sentences=_origin(comparison))


def _explanations(comparison: Comparison) -> list[str]:
    largest = max(len([row for row in table.rows if row.difference]) for table in comparison.tables)
    return [
        "**SE seeds** is the standard deviation between the seeds of one row over √k: how well k trainings know the "
        "method. It knows nothing of other questions.",
        "**SE items** is over the items of the task, each averaged over the seeds and weighted where its items are "
        "(texts by their tokens): how well this task knows the model. It knows nothing of other seeds.",
        f"**minus {comparison.baseline}** is paired over items: both answered the same ones, and what makes an item "
        f"hard for both drops out. Its interval over items is the percentiles of {RESAMPLES:,} bootstrap resamples; "
        "its p-value is that of Student's t.",
        "**Over seeds** the difference is unpaired, with the variance between seeds pooled over all trained models of "
        "the table, since two or three seeds alone hardly know a variance. It takes every method to vary alike.",
        f"**p (Holm)** is the larger of both p-values, adjusted by Holm over the family: all comparisons with "
        f"`{comparison.baseline}` in one table (here up to {largest}). Several tables are several families.",
        "**Verdict**: a difference is called better or worse, and is bold, only where p (Holm) is below 0.05 and both "
        "intervals exclude 0. *Not shown* does not say that there is none. With one seed, or without items, the other "
        "error decides alone.",
        "**Costs** are those of the trainings compared: the search for their settings, and what it took to get the "
        "teacher, are not counted. Times hold for the machine and the load given.",
    ]


def _origin(comparison: Comparison) -> list[str]:
    found = comparison.provenance
    facts = {
        "Machine": "; ".join(found["machines"]),
        "Load while measuring": " to ".join(dict.fromkeys(f"{load:.1f}" for load in found["load"] or ())),
        "Measured": " to ".join(dict.fromkeys(found["time"] or ())),
        "Commit": ", ".join(found["commits"]),
        "Versions": ", ".join(f"{package} {' and '.join(each)}" for package, each in found["versions"].items()),
        "Evaluation configs, SHA-256": ", ".join(config[:12] for config in found["configs"]),
        "Results": f"{found['results']:,} lines",
    }
    return [f"**{key}**: {text or 'not recorded'}" for key, text in facts.items()]


def _with_code(sentence: str) -> str:
    """Return a sentence's Markdown (code, bold, italic) as HTML."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(sentence))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))
