"""The figures of a comparison: forest of differences, heat map, Pareto of quality over latency, learning curves.

Each function returns a matplotlib figure, or None where its data are missing.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchtune_kd.reports.comparison import Difference, Facts, Row, Table, metric_of
from torchtune_kd.reports.tables import decimals, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NORMAL = 1.96  # standard errors in half of a 95 % interval of the normal distribution
ITEMS, SEEDS, PLAIN = "#2f7fc1", "#d9731a", "#7a8594"  # readable on white and on black
PAPER = "#fdfcfb"  # inside of a hollow marker: in a page, the page's own
# of lines and points; told apart by dashes and shapes as well, since they repeat
COLOURS = ("#2f7fc1", "#d9731a", "#2c9a4b", "#d0493f", "#9068be", "#a0705f", "#c75fae", "#7a8594", "#9a9a1f", "#1a9fb0")
DASHES = ("-", "--", ":", "-.")
SHAPES = "osD^vPX"

Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]


def forest(table: Table, baseline: str) -> "Figure | None":
    """Draw every difference to the baseline with its interval over items and that over seeds."""
    rows = [row for row in table.rows if row.difference is not None and row.difference.p is not None]
    if not rows:
        return None
    figure, axes = _figure(7.6 + _more_width(row.name for row in rows), 1.5 + 0.36 * len(rows))
    trained = [row for row in rows if list(row.seeds) != [None]] or rows
    ends = [0.0, *(end for row in trained for end in _ends(row))]
    margin = 0.08 * ((max(ends) - min(ends)) or 1.0)
    low, high = min(ends) - margin, max(ends) + margin
    axes.set_xlim(low, high)
    for place, row in enumerate(reversed(rows)):
        difference = row.difference
        if not low < difference.value < high:  # untrained or teacher: in sight, they would squeeze all others
            arrow, x, side = ("◀ {}", 0.01, "left") if difference.value < 0 else ("{} ▶", 0.99, "right")
            text = arrow.format(number(difference.value, decimals(table), "+"))
            axes.text(x, place, text, transform=axes.get_yaxis_transform(), ha=side, va="center", fontsize=9)
            continue
        if difference.items is not None:
            _interval(axes, difference.resampled, place + 0.14, difference, ITEMS, "o")
        if difference.seeds is not None:
            _interval(axes, (difference.seeds.low, difference.seeds.high), place - 0.14, difference, SEEDS, "s")
    axes.axvline(0, color=PLAIN, linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{table.task}: {table.label}, minus that of {baseline}{_direction(table)}")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.plot([], [], "o-", color=ITEMS, linewidth=2.5, markersize=5.5, label="95 % over items")
    axes.plot([], [], "s-", color=SEEDS, linewidth=1.3, markersize=4.5, label="95 % over seeds")
    axes.plot([], [], "o", color=PLAIN, markerfacecolor=PAPER, markersize=5.5, label="hollow: not shown")
    figure.legend(frameon=False, ncols=3, loc="outside upper center", fontsize=9)
    return figure


def heat_map(table: Table, coordinates: Mapping[str, Mapping[str, Any]]) -> "Figure | None":
    """Draw the means over two keys of the grid, with the error in each cell; more keys are held at one value each."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    found = plane(table.rows, coordinates)
    if found is None:
        return None
    (x_key, xs), (y_key, ys), cells, fixed = found
    means, digits = [row.mean for row in cells.values()], decimals(table)
    scale = Normalize(min(means), max(means) if max(means) > min(means) else min(means) + 1)
    colours = colormaps["viridis_r" if table.better < 0 else "viridis"]
    figure, axes = _figure(2.6 + 1.15 * len(xs), 1.4 + 0.62 * len(ys))
    grid = [[cells[x, y].mean if (x, y) in cells else float("nan") for x in xs] for y in ys]
    image = axes.imshow(grid, cmap=colours, norm=scale, aspect="auto")
    for (x, y), row in cells.items():
        error = row.se_items if row.se_seeds is None else row.se_seeds
        red, green, blue, _ = colours(scale(row.mean))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        text = number(row.mean, digits) + ("" if error is None else f"\n±{number(error, digits)}")
        axes.text(xs.index(x), ys.index(y), text, ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(range(len(xs)), [_short(x) for x in xs])
    axes.set_yticks(range(len(ys)), [_short(y) for y in ys])
    axes.set_xlabel(x_key)
    axes.set_ylabel(y_key)
    axes.set_title(
        ", ".join(f"{key} = {_short(value)}" for key, value in fixed.items() if value is not None), fontsize=9
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, label=f"{table.task}: {table.label}{_direction(table)}")
    bar.outline.set_visible(False)
    return figure


def pareto(table: Table, latency: Facts | None, size: Facts | None) -> "Figure | None":
    """Draw quality over the median time of a token; the area of a marker is that of the weights' bytes."""
    times = latency.rows if latency else {}
    shown = [row for row in table.rows if "decode_seconds_p50" in times.get(row.name, {}) and row.mean == row.mean]
    if len(shown) < 2:
        return None
    figure, axes = _figure(7.6 + _more_width(row.name for row in shown), max(3.6, 1.2 + 0.27 * len(shown)))
    areas = _areas([row.name for row in shown], size)
    points = []
    for place, row in enumerate(shown):
        style = {"color": COLOURS[place % len(COLOURS)], "marker": SHAPES[place % len(SHAPES)]}
        x = times[row.name]["decode_seconds_p50"].mean * 1e3
        slow = times[row.name].get("decode_seconds_p90")
        axes.errorbar(
            x,
            row.mean,
            xerr=None if slow is None else [[0], [max(0.0, slow.mean * 1e3 - x)]],
            yerr=None if row.se_items is None else NORMAL * row.se_items,
            color=style["color"],
            linewidth=0.7,
            alpha=0.7,
        )
        axes.scatter(x, row.mean, s=areas[row.name], alpha=0.75, linewidths=0, **style)
        points.append((x, row.mean, row.name, {**style, "linestyle": ""}))
    if table.better:
        front = _front([(x, y) for x, y, *_ in points], table.better)
        axes.plot(*zip(*front, strict=True), ":", color=PLAIN, linewidth=1, zorder=0)
    axes.set_xlabel(f"{metric_of('decode_seconds_p50').label} ({latency.task}), ms")
    axes.set_ylabel(f"{table.task}: {table.label}{_direction(table)}")
    axes.margins(0.08)
    _finish(axes, [(y, name, style) for _, y, name, style in points])
    return figure


def learning_curves(metric: str, curves: Curves) -> "Figure | None":
    """Draw the mean over seeds of each cell over the optimizer step, in a band from the least to the largest seed."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = _figure(8.4 + _more_width(curves), max(4.0, 1.2 + 0.24 * len(curves)))
    ends, lowest = [], []
    for place, (name, seeds) in enumerate(curves.items()):
        by_step = [dict(points) for points in seeds]
        steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
        if not steps:
            continue
        values = [[each[step] for each in by_step] for step in steps]
        means = [sum(each) / len(each) for each in values]
        style = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}
        axes.plot(steps, means, linewidth=1.4, **style)
        least, most = list(map(min, values)), list(map(max, values))
        axes.fill_between(steps, least, most, color=style["color"], alpha=0.15, linewidth=0)
        ends.append((means[-1], name, style))
        lowest.append(min(least))
    if not ends:
        return None
    known = metric_of(metric.removeprefix("val_"))
    if known.better < 0 < min(lowest):  # what falls fast at first is told apart at its end
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(known.label + (f", {known.unit}" if known.unit else ""))
    _finish(axes, ends)
    return figure


Axis = tuple[str, list[Hashable]]


def plane(
    rows: Sequence[Row], coordinates: Mapping[str, Mapping[str, Any]]
) -> tuple[Axis, Axis, dict[tuple[Hashable, Hashable], Row], dict[str, Hashable]] | None:
    """Find the plane of the grid that holds the most cells.

    Returns:
        tuple | None: x key and values, y key and values, rows by (x, y), and the other keys' values; None where fewer
            than two keys vary.
    """
    places = {
        row.name: {key: value if isinstance(value, Hashable) else str(value) for key, value in place.items()}
        for row in rows
        if row.mean == row.mean and (place := coordinates.get(row.name))
    }
    keys = dict.fromkeys(key for place in places.values() for key in place)
    values = {key: _ordered([place[key] for place in places.values() if key in place]) for key in keys}
    varied = [key for key in keys if len(values[key]) > 1]
    if len(varied) < 2:
        return None
    y_key, x_key = sorted(varied[:2], key=lambda key: all(isinstance(value, int | float) for value in values[key]))
    planes: dict[tuple, dict[tuple[Hashable, Hashable], Row]] = {}
    for row in rows:
        place = places.get(row.name, {})
        if x_key in place and y_key in place:
            rest = tuple((key, place.get(key)) for key in varied[2:])
            planes.setdefault(rest, {})[place[x_key], place[y_key]] = row
    fixed, cells = max(planes.items(), key=lambda each: len(each[1]), default=((), {}))
    xs, ys = (
        [value for value in values[key] if any(value == at[i] for at in cells)] for i, key in ((0, x_key), (1, y_key))
    )
    return ((x_key, xs), (y_key, ys), cells, dict(fixed)) if len(xs) > 1 and len(ys) > 1 else None


def _ordered(values: Sequence[Hashable]) -> list[Hashable]:
    distinct = list(dict.fromkeys(values))
    return sorted(distinct) if all(isinstance(value, int | float) for value in distinct) else distinct


def _areas(names: Sequence[str], size: Facts | None) -> dict[str, float]:
    """Return areas of markers, the largest model's 240 square points; 60 where sizes are not known."""
    rows = size.rows if size else {}
    key = next(
        (key for key in ("weight_bytes", "file_bytes") if all(key in rows.get(name, {}) for name in names)), None
    )
    if key is None:
        return dict.fromkeys(names, 60.0)
    largest = max(rows[name][key].mean for name in names)
    return {name: 240 * rows[name][key].mean / largest for name in names}


def _front(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """Return the points than which no other is at least as fast and better, by time."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -better * point[1])):
        if not front or better * y > better * front[-1][1]:
            front.append((x, y))
    return front


def _more_width(names: Iterable[str]) -> float:
    """Return the inches by which names are longer than those that a figure has room for."""
    return 0.07 * max(0, max(map(len, names), default=0) - 12)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _finish(axes: "Axes", drawn: Sequence[tuple[float, str, Mapping[str, Any]]]) -> None:
    """Name what was drawn (height, name, style) to the right of the axes, the highest first."""
    from matplotlib.lines import Line2D

    axes.grid(alpha=0.3)
    axes.spines[["right", "top"]].set_visible(False)
    ranked = sorted(drawn, key=lambda each: -each[0])
    handles = [Line2D([], [], label=name, markersize=6, **style) for _, name, style in ranked]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def _interval(
    axes: "Axes", ends: tuple[float, float], height: float, difference: Difference, colour: str, shape: str
) -> None:
    axes.plot(ends, [height] * 2, color=colour, linewidth=2.5 if shape == "o" else 1.3, solid_capstyle="butt")
    inside = colour if difference.is_shown else PAPER
    axes.plot(difference.value, height, shape, color=colour, markerfacecolor=inside, markersize=5.5)


def _ends(row: Row) -> list[float]:
    """Return the ends of both intervals of a row."""
    difference = row.difference
    seeds = difference.seeds
    return [*(difference.resampled or ()), *(() if seeds is None else (seeds.low, seeds.high))]


def _direction(table: Table) -> str:
    better = {1: "more is better", -1: "less is better", 0: ""}[table.better]
    said = ", ".join(filter(None, (table.unit, better)))
    return f"\n({said})" if said else ""


def _short(value: Hashable) -> str:
    """Return a value of the grid; of a dotted path its last name."""
    return value.rpartition(".")[2] if isinstance(value, str) else f"{value}"
