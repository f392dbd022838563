"""Standard errors, intervals and tests of a comparison: over items and over seeds, kept apart.

Two things could have come out otherwise. Other *items* might have been asked: their spread says how well a task of this
size knows a model. Another *seed* might have trained it: the spread of the trained models says how well so many seeds
know the method. Neither contains the other, and a difference that holds has to hold against both.

N items, K seeds, C comparisons.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of every interval
RESAMPLES = 4000  # of the bootstrap: an end of its interval then moves by some hundredths of a standard error


class Estimate(NamedTuple):
    """A mean and its standard error; None where one observation alone cannot tell it."""

    mean: float
    se: float | None


class Spread(NamedTuple):
    """The standard deviation between the seeds of a cell, pooled over cells, and its degrees of freedom."""

    sd: float
    dof: int


@dataclass(frozen=True)
class Interval:
    """A difference's standard error, 95 % interval and two-sided p-value."""

    se: float
    low: float
    high: float
    p: float


def over_items(items: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> Estimate:
    """Return the mean Σ w x / Σ w over items [N] and the standard error of this ratio of two sums.

    An item is the unit that was drawn (a question, a text): its tokens are not independent of each other, so its weight
    is their number and N counts items.
    """
    x, w = _arrays(items, weights)
    mean = float(w @ x / w.sum())
    if len(x) < 2:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(len(x) / (len(x) - 1) * ((w * (x - mean)) ** 2).sum()) / float(w.sum()))


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean of the values of K seeds, and its standard error s / √K."""
    mean = float(np.mean(values))
    return Estimate(mean, float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None)


def pooled(cells: Sequence[Sequence[float]]) -> Spread:
    """Pool the variance between seeds over the cells: three seeds alone would know it to a factor of four.

    This takes the method to change the mean and not the spread.
    """
    dof = sum(len(values) - 1 for values in cells)
    squares = sum(float(np.var(values)) * len(values) for values in cells if len(values) > 1)
    return Spread(math.sqrt(squares / dof) if dof else 0.0, dof)


def difference_over_items(
    differences: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None
) -> Interval | None:
    """Return the t interval of a mean paired difference over items [N]; None for fewer than two."""
    mean, se = over_items(differences, weights)
    return None if se is None else t_interval(mean, se, len(differences) - 1)


def difference_over_seeds(difference: float, seeds: tuple[int, int], spread: Spread) -> Interval | None:
    """Return the t interval of a difference between two cells, unpaired; None where the spread is not known.

    Args:
        difference (float): of the cells' means.
        seeds (tuple[int, int]): of both; 0 for what was not trained, which no seed changes.
        spread (Spread): over all trained cells.
    """
    if not spread.dof or not any(seeds):
        return None
    return t_interval(difference, spread.sd * math.sqrt(sum(1 / k for k in seeds if k)), spread.dof)


def t_interval(difference: float, se: float, dof: int) -> Interval:
    """Return the 95 % interval and the p-value of Student's t."""
    width = t_quantile(dof) * se
    p = t_tail(difference / se, dof) if se > 0 else float(difference == 0)
    return Interval(se, difference - width, difference + width, p)


def bootstrap(
    differences: np.ndarray, weights: Sequence[float] | np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Return percentile intervals [C, 2] of the mean paired differences [N, C], items drawn with replacement.

    All comparisons see the same resamples, so that they can be compared with each other.
    """
    random = np.random.default_rng(seed)
    count, comparisons = differences.shape
    x, w = _arrays(differences, weights)
    weighted = w[:, None] * x
    means = np.empty((RESAMPLES, comparisons))
    for row in means:
        drawn = np.bincount(random.integers(count, size=count), minlength=count).astype(float)
        row[:] = drawn @ weighted / (drawn @ w)
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of a family adjusted by Holm's step-down rule, in the order given.

    Those below 0.05 can all be called significant, and one or more of them is wrong in 5 % of such families at most.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def t_tail(t: float, dof: int) -> float:
    """Return P(|T| >= |t|) of Student's t with ``dof`` degrees of freedom, a whole number.

    With θ = arctan(t/√dof) it is a finite sum of cosines: Abramowitz & Stegun, 26.7.3 and 26.7.4. One minus it loses
    what lies below 1e-15, which no report prints.
    """
    angle = math.atan2(abs(t), math.sqrt(dof))
    k = np.arange(1 + dof % 2, dof - 2, 2)
    series = math.sin(angle) * (1 + float(np.cumprod(k / (k + 1) * math.cos(angle) ** 2).sum()))
    if dof == 1:
        inside = 2 / math.pi * angle
    elif dof % 2:
        inside = 2 / math.pi * (angle + math.cos(angle) * series)
    else:
        inside = series
    return max(0.0, 1.0 - inside)


@functools.lru_cache(maxsize=256)
def t_quantile(dof: int, level: float = LEVEL) -> float:
    """Return the t with P(|T| < t) = ``level``."""
    low, high = 0.0, 1.0
    while t_tail(high, dof) > 1 - level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, dof) > 1 - level else (low, middle)
    return high


def _arrays(
    items: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(items, dtype=float)
    return x, np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
