"""Pictures of what the experiments found, with standard errors over the seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import Findings, Table, mean_and_error


def write_plots(findings: Mapping[str, Findings], folder: Path) -> list[Path]:
    """Draw the experiments that have a picture; returns the PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    files = []
    for name, draw in {"temperature": _temperature, "data": _data, "omitted": _omitted}.items():
        if name not in findings:
            continue
        tables = findings[name].tables
        panels = tables[1:] if name == "temperature" else tables  # its first is of the teachers
        size = 5.2 * len(panels), 4.2
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for each, table in zip(axes[0], panels, strict=True):
            draw(each, table)
            each.spines[["top", "right"]].set_visible(False)
            each.grid(alpha=0.3)
            each.set_axisbelow(True)
            each.label_outer()
        figure.legend(*each.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
        plt.close(figure)
    return files


def _temperature(axes: Any, table: Table) -> None:
    for name, row in table.rows.items():
        _line(axes, [int(column.removeprefix("T = ")) for column in row], row.values(), f"{name} teacher")
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set(xscale="log", xlabel="temperature", ylabel="test error less that of hard labels, points")
    axes.set(title=table.title.partition(",")[0])
    _ticks(axes, [int(column.removeprefix("T = ")) for column in next(iter(table.rows.values()))])


def _data(axes: Any, table: Table) -> None:
    percentages = [int(name.partition(" ")[0]) for name in table.rows]
    for column in next(iter(table.rows.values())):
        _line(axes, percentages, [row[column] for row in table.rows.values()], column)
    axes.set(xscale="log", yscale="log", xlabel="training images, % of 1,197", ylabel="test error, %")
    axes.set(title=table.title.rpartition(", ")[2].capitalize())
    _ticks(axes, percentages)
    axes.set_yticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    axes.minorticks_off()


def _omitted(axes: Any, table: Table) -> None:
    columns = [column for column in next(iter(table.rows.values())) if "recognised" in column]
    for offset, column, label in zip((-0.2, 0.2), columns, ("as trained", "with the bias raised"), strict=True):
        means, errors = zip(*(mean_and_error(row[column]) for row in table.rows.values()), strict=True)
        axes.bar([place + offset for place in range(len(means))], means, 0.4, yerr=errors, capsize=3, label=label)
    axes.set_xticks(range(len(table.rows)), table.rows)
    axes.set(ylim=(0, 100), ylabel="omitted classes recognised, %", title=table.title.partition(",")[0])


def _line(axes: Any, x: list[int], cells: Any, label: str) -> None:
    means, errors = zip(*map(mean_and_error, cells), strict=True)
    axes.errorbar(x, means, errors, marker="o", capsize=3, label=label)


def _ticks(axes: Any, places: list[int]) -> None:
    axes.set_xticks(places, map(str, places))
    axes.set_xticks([], minor=True)
