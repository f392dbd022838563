"""Errors, intervals and tests against closed forms and tables, and 95 % intervals that cover in 95 of 100 worlds."""

import math

import numpy as np
import pytest

from torchtune_kd.reports import statistics
from torchtune_kd.reports.statistics import Spread

COVERS = (0.93, 0.97)


def test_error_over_equal_items_is_s_over_root_n():
    mean, se = statistics.over_items([1.0, 2.0, 4.0, 9.0])
    assert (mean, se) == (4.0, pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 3 / 4)))


def test_error_over_weighted_items_is_that_of_a_ratio():
    """Weights 1 and 3 of the values 2 and 6: mean 5, deviations -3 and 1, each times its weight."""
    mean, se = statistics.over_items([2.0, 6.0], [1.0, 3.0])
    assert (mean, se) == (5.0, pytest.approx(math.sqrt(2 * ((1 * 3) ** 2 + (3 * 1) ** 2)) / 4))
    assert statistics.over_items([2.0, 6.0], [10.0, 30.0]) == pytest.approx((mean, se))


def test_tokens_of_one_text_are_not_more_items():
    """The same four texts with a hundred times the tokens know no more of other texts."""
    assert statistics.over_items([1.0, 2.0, 3.0, 5.0], [100.0] * 4) == statistics.over_items([1.0, 2.0, 3.0, 5.0])


def test_one_observation_has_no_error():
    assert statistics.over_items([0.5]) == (0.5, None) == statistics.over_seeds([0.5])
    assert statistics.difference_over_items([0.5]) is None


def test_error_over_seeds():
    assert statistics.over_seeds([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))


def test_variance_between_seeds_is_pooled_by_degrees_of_freedom():
    """Sums of squares 2 and 8 over 1 + 2 degrees of freedom; a cell with one seed adds nothing."""
    spread = statistics.pooled([[0.0, 2.0], [1.0, 3.0, 5.0], [7.0]])
    assert spread == (pytest.approx(math.sqrt((2 + 8) / 3)), 3)
    assert statistics.pooled([[1.0], [2.0]]).dof == 0


def test_difference_over_seeds():
    interval = statistics.difference_over_seeds(0.5, (3, 2), Spread(0.3, 4))
    assert interval.se == pytest.approx(0.3 * math.sqrt(1 / 3 + 1 / 2))
    assert (interval.low, interval.high) == pytest.approx((0.5 - 2.776445 * interval.se, 0.5 + 2.776445 * interval.se))
    untrained = statistics.difference_over_seeds(0.5, (3, 0), Spread(0.3, 4))
    assert untrained.se == pytest.approx(0.3 / math.sqrt(3))
    assert statistics.difference_over_seeds(0.5, (0, 0), Spread(0.3, 4)) is None
    assert statistics.difference_over_seeds(0.5, (1, 1), Spread(0.0, 0)) is None


def test_equal_seeds_leave_no_doubt():
    assert statistics.difference_over_seeds(0.1, (3, 3), Spread(0.0, 4)).p == 0
    assert statistics.difference_over_seeds(0.0, (3, 3), Spread(0.0, 4)).p == 1


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 40.0])
def test_tail_of_students_t_in_closed_form(t):
    assert statistics.t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)
    assert statistics.t_tail(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)
    cubic = math.atan(t / math.sqrt(3)) + t * math.sqrt(3) / (3 + t * t)
    assert statistics.t_tail(t, 3) == pytest.approx(1 - 2 / math.pi * cubic, abs=1e-14)
    quartic = t * (6 + t * t) / (4 + t * t) ** 1.5
    assert statistics.t_tail(t, 4) == pytest.approx(1 - quartic, abs=1e-14)


@pytest.mark.parametrize(
    ("dof", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799), (10**5, 1.96)],
)
def test_quantiles_are_those_of_the_tables(dof, quantile):
    assert statistics.t_quantile(dof) == pytest.approx(quantile, abs=5e-5)
    assert statistics.t_tail(statistics.t_quantile(dof), dof) == pytest.approx(0.05, abs=1e-10)


def test_tails_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for dof in (1, 2, 3, 7, 8, 26, 199, 1220):
        for t in (0.0, 0.01, 0.7, 1.9, 4.2, 12.0):
            assert statistics.t_tail(t, dof) == pytest.approx(2 * stats.t.sf(t, dof), abs=1e-13), (t, dof)


def test_holm():
    """The example: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04 raised to what came before it."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.7, 0.6]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_bootstrap_of_constant_differences_is_that_constant():
    ends = statistics.bootstrap(np.full((20, 2), [0.25, -1.0]), range(1, 21))
    assert ends == pytest.approx(np.array([[0.25, 0.25], [-1, -1]]))


def test_bootstrap_agrees_with_students_t_on_many_items():
    random = np.random.default_rng(1)
    x, weights = random.normal(0.2, 1, (600, 1)), random.integers(1, 9, 600)
    interval = statistics.difference_over_items(x[:, 0], weights)
    ((low, high),) = statistics.bootstrap(x, weights)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=0.1 * interval.se)


def test_bootstrap_repeats_and_does_not_depend_on_its_neighbours():
    x = np.random.default_rng(2).normal(size=(30, 3))
    ends = statistics.bootstrap(x)
    assert (ends == statistics.bootstrap(x)).all()
    assert ends[1] == pytest.approx(statistics.bootstrap(x[:, 1:2])[0])
    assert (ends != statistics.bootstrap(x, seed=1)).any()


def weighted_world(random, worlds, count):
    """Items whose values depend on their weights, [worlds, count]; and the ratio that they estimate."""
    weights = random.integers(1, 10, (worlds, count)).astype(float)
    x = 0.1 * weights + random.gamma(2, 0.5, (worlds, count))
    return x, weights, (0.1 * 285 / 9 + 1.0 * 5) / 5  # E[w x] / E[w]: E[w] = 5, E[w²] = 285 / 9


def test_intervals_over_weighted_items_cover():
    x, weights, truth = weighted_world(np.random.default_rng(3), 1500, 100)
    intervals = [statistics.difference_over_items(*world) for world in zip(x, weights, strict=True)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert COVERS[0] <= covered <= COVERS[1]
    ignorant = [statistics.difference_over_items(world) for world in x]  # without the weights it is another mean
    assert np.mean([interval.low <= truth <= interval.high for interval in ignorant]) < COVERS[0]


def test_bootstrap_intervals_cover():
    x = np.random.default_rng(4).gamma(2, 0.5, (100, 1500))
    low, high = statistics.bootstrap(x).T
    assert COVERS[0] <= np.mean((low <= 1) & (high >= 1)) <= COVERS[1]


def test_intervals_over_seeds_cover():
    """Thirteen cells of three seeds: what one table pools."""
    random = np.random.default_rng(5)
    covered = []
    for _ in range(1500):
        cells = random.normal(0, 0.3, (13, 3)) + np.arange(13)[:, None]
        interval = statistics.difference_over_seeds(
            cells[5].mean() - cells[0].mean(), (3, 3), statistics.pooled(cells.tolist())
        )
        covered.append(interval.low <= 5 <= interval.high)
    assert COVERS[0] <= np.mean(covered) <= COVERS[1]


def test_holm_keeps_the_family_at_five_percent():
    """Twelve comparisons with one baseline, none of them different; without Holm a quarter of the families has one."""
    random = np.random.default_rng(6)
    wrong, unadjusted = 0, 0
    for _ in range(800):
        items = random.normal(size=(13, 60))
        p_values = [statistics.difference_over_items(cell - items[0]).p for cell in items[1:]]
        wrong += min(statistics.holm(p_values)) < 0.05
        unadjusted += min(p_values) < 0.05
    assert 0.01 < wrong / 800 < 0.065 < 0.2 < unadjusted / 800
