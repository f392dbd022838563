"""The cells of a sweep: every combination of the grid's values, single cells, and what is left out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtune_kd.errors import UserError


@dataclass(frozen=True)
class Cell:
    """One line of the table to come.

    Attributes:
        name (str): unique in the sweep.
        coordinates (Mapping[str, Any]): labels of the grid's values, by key; empty for a single cell.
        overrides (Mapping[str, Any]): values of the run's config, by dotted key.
    """

    name: str
    coordinates: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)


def cells_of(
    grid: Mapping[str, Any], single: Mapping[str, Mapping[str, Any]], exclude: Sequence[Mapping[str, Any]]
) -> list[Cell]:
    """Return the grid's product without what is excluded, then the single cells.

    Args:
        grid (Mapping[str, Any]): for each dotted key its values, as a list or as a mapping of labels to values.
        single (Mapping[str, Mapping[str, Any]]): overrides of each cell that stands beside the grid, by its name.
        exclude (Sequence[Mapping[str, Any]]): labels, by key; a cell that has all of one of these is left out.

    Raises:
        UserError: for an empty list of values, a name twice, or an exclusion that fits no cell.
    """
    axes = {key: _labelled(key, values) for key, values in grid.items()}
    cells, used = [], set()
    for labels in itertools.product(*axes.values()) if axes else ():
        coordinates = dict(zip(axes, labels, strict=True))
        hits = [number for number, rule in enumerate(exclude) if rule and rule.items() <= coordinates.items()]
        used.update(hits)
        if not hits:
            overrides = {key: axes[key][label] for key, label in coordinates.items()}
            cells.append(Cell(_name(coordinates), coordinates, overrides))
    for number, rule in enumerate(exclude):
        if number not in used:
            raise UserError(f"`exclude[{number}]` is {dict(rule)}, which is no cell of the grid: correct or delete it.")
    cells += [Cell(name, {}, dict(overrides)) for name, overrides in single.items()]
    names = [cell.name for cell in cells]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise UserError(f"Expected one cell of each name, but {sorted(double)[0]!r} stands twice: rename one.")
    if not cells:
        raise UserError("Expected at least one cell under `grid` or `cells`, but there is none: add some.")
    return cells


def tuning_points(tune: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the product of what is tuned, the same for every cell; one empty point where nothing is."""
    for values in itertools.product(*tune.values()):
        yield dict(zip(tune, values, strict=True))


def _labelled(key: str, values: Any) -> dict[Any, Any]:
    if isinstance(values, Mapping) and values:
        return dict(values)
    if isinstance(values, Sequence) and not isinstance(values, str) and values:
        return {value: value for value in values}
    raise UserError(
        f"Expected a list of values, or labels with values, under `grid` for `{key}`, got {values!r}: add some."
    )


def _name(coordinates: Mapping[str, Any]) -> str:
    """Name a cell by its labels; a number or a truth value says which key it belongs to."""
    parts = []
    for key, label in coordinates.items():
        plain = isinstance(label, str) and not label.replace(".", "").isdigit()
        parts.append(label if plain else f"{_SHORT.get(key, key.rpartition('.')[2])}={label}")
    return ", ".join(parts)


_SHORT = {"kd_loss.temperature": "T", "optimizer.lr": "lr"}
