"""Hold what a task gives: a metric, its value, and the items behind it."""

from collections.abc import Sequence
from typing import NamedTuple

from torchtune_kd.reports import statistics


class Measured(NamedTuple):
    """One metric of one model on one task.

    Attributes:
        metric (str): a key of :data:`torchtune_kd.reports.results.METRICS`, or a name that lm-eval gives.
        value (float): the mean over the items, or the figure itself.
        se (float | None): standard error over the items.
        n (int): items.
        items (Sequence[float] | None): their values.
        weights (Sequence[float] | None): their weights.
    """

    metric: str
    value: float
    se: float | None = None
    n: int = 0
    items: Sequence[float] | None = None
    weights: Sequence[float] | None = None


def over_items(metric: str, items: Sequence[float], weights: Sequence[float] | None = None) -> Measured:
    """Return the mean over items, with its standard error; weights are for example the tokens of each."""
    mean, se = statistics.over_items(items, weights)
    return Measured(metric, mean, se, len(items), items, weights)
