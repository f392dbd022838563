"""The demo ends by the clock: on a quiet machine in six minutes, on a busy one in eight, after a handful of steps."""

import math

import pytest

from torchtune_kd.demo import budget
from torchtune_kd.demo.budget import Deadline
from torchtune_kd.training.time_limit import LEAST_STEPS, TimeLimit


class Clock:
    """Stands still until it is told to move."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for kind in (Deadline, TimeLimit):
            monkeypatch.setattr(kind, "clock", staticmethod(lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_deadline_counts_from_its_making(clock):
    deadline = Deadline(100)
    clock.now += 30
    assert (deadline.elapsed(), deadline.left()) == (30, 70)
    clock.now += 80
    assert deadline.left() == -10


@pytest.mark.parametrize("each, expected", [(1, 8), (2.5, 8), (4, 5), (15, 1), (90, 1)])
def test_items_come_while_one_more_would_end_in_time(clock, each, expected):
    items, start = [], clock.now
    for item in Deadline().within(20, range(8)):
        items.append(item)
        clock.now += each
    assert items == list(range(expected))
    assert clock.now - start <= max(20, each)


def test_the_slowest_item_counts(clock):
    taken = 0
    for seconds in Deadline().within(18, [1, 8, 1, 1, 1, 1]):
        clock.now += seconds
        taken += 1
    assert taken == 4  # after 11 s; one more might take 8


PACE = 0.0007  # seconds a token of the teacher, of two cores


@pytest.fixture
def plan(clock):
    def at(elapsed, slowness, **more):
        deadline = Deadline()
        clock.now += elapsed
        sizes = {"step_tokens": 510, "rows": 19, "row_tokens": 255, "validations": 3} | more
        return budget.plan_training(deadline, slowness * PACE, **sizes)

    return at


def test_a_machine_that_is_not_slow_validates_on_all_held_out_text(plan):
    plan = plan(elapsed=30, slowness=1)
    assert plan.minutes * 60 == budget.SECONDS - 30 - budget.MEASURING - budget._AROUND_TRAINING
    assert plan.validation_rows == 19
    assert 20 < plan.validate_every < 60


def test_a_slow_machine_validates_on_less_and_trains_as_long(plan):
    quick, slow = plan(elapsed=30, slowness=1), plan(elapsed=30, slowness=10)
    assert slow.minutes == quick.minutes
    row = 10 * PACE * 255 * budget._VALIDATING
    assert 2 <= slow.validation_rows < 19
    assert slow.validation_rows * row <= budget._VALIDATION * slow.minutes * 60
    assert plan(elapsed=30, slowness=1000).validation_rows == 2


def test_a_plan_is_one_however_late_it_is(plan):
    late = plan(elapsed=900, slowness=1)
    assert late.minutes > 0 and late.validation_rows >= 2 and late.validate_every >= 1


@pytest.mark.parametrize("slowness, rows", [(0.1, 250), (1, 250), (3, 107), (1000, 2)])
def test_the_teacher_reads_what_its_share_of_the_time_allows(clock, slowness, rows):
    deadline = Deadline()
    clock.now += 30
    found = budget.cached_rows(deadline, slowness * PACE, rows=250, row_tokens=255)
    assert found == rows
    assert found <= 2 or found * 255 * slowness * PACE < 0.3 * deadline.left()


def test_steps_from_a_cache_are_quicker(plan):
    assert plan(elapsed=30, slowness=1, cached=True).validate_every > plan(elapsed=0, slowness=1).validate_every


def pretend_demo(clock, slowness, *, cached=False):
    """The demo's phases on a machine that is ``slowness`` times as slow as two quiet cores: seconds, steps, share."""
    pace, row_tokens = slowness * PACE, 255
    deadline, start = Deadline(), clock.now
    clock.now += 8 * slowness  # imports, teacher, text
    for _ in deadline.within(budget.CHOOSING, range(8)):
        clock.now += 1.3 * slowness

    def plan_training():
        sizes = {"step_tokens": 2 * row_tokens, "rows": 19, "row_tokens": row_tokens, "validations": 3}
        return budget.plan_training(deadline, pace, **sizes, cached=cached)

    validation_rows = plan_training().validation_rows
    if cached:
        rows = budget.cached_rows(deadline, pace, rows=340, row_tokens=row_tokens)
        clock.now += 9 * slowness  # imports of the caching process, the teacher, data
        clock.now += 1.3 * pace * row_tokens * (rows + validation_rows)
    plan = plan_training()
    clock.now += 6 * slowness  # imports of the training process
    limit, step = TimeLimit(plan.minutes * 60, began=clock.now), 0
    clock.now += 3 * slowness  # models and data

    def validate():
        limit.begin_validation()
        clock.now += slowness * 0.5 * validation_rows
        limit.end_validation()

    validate()
    planned = budget.MOST_STEPS
    while step < planned:
        limit.begin_step()
        clock.now += (1.5 if cached else 2) * slowness
        step += 1
        planned = limit.plan(step, budget.MOST_STEPS)[1]
        if step == planned or step % plan.validate_every == 0:
            validate()
    clock.now += 2 * slowness  # export
    clock.now += 3 * slowness  # models
    clock.now += min(23 * slowness, max(deadline.left(), 12))  # texts and speeds stop by the clock
    clock.now += 2 * slowness  # picture, tables
    return clock.now - start, step, step / planned


@pytest.mark.parametrize("slowness, minutes", [(0.1, 6), (0.5, 6), (1, 6), (1.5, 6), (2, 6), (3, 8), (6, 8)])
def test_the_whole_demo_ends_in_time_with_its_schedule_at_its_end(clock, slowness, minutes):
    seconds, steps, schedule = pretend_demo(clock, slowness)
    assert seconds < 60 * minutes
    assert steps >= LEAST_STEPS and schedule == 1
    assert math.isclose(steps, 600 if slowness == 0.1 else 220 / (2 * slowness), rel_tol=0.35)


@pytest.mark.parametrize("slowness, minutes", [(0.1, 6), (0.5, 6), (1, 6), (1.5, 6), (2, 6), (3, 8), (6, 8)])
def test_a_demo_with_a_cache_ends_in_the_same_time(clock, slowness, minutes):
    """The caching run alone has no time limit: it is given what its share of the time allows."""
    seconds, steps, schedule = pretend_demo(clock, slowness, cached=True)
    assert seconds < 60 * minutes
    assert steps >= LEAST_STEPS and schedule == 1
    assert slowness > 1 or steps > 0.7 * pretend_demo(clock, slowness)[1]


def test_a_machine_twelve_times_as_slow_still_trains(clock):
    seconds, steps, schedule = pretend_demo(clock, 12)
    assert steps >= LEAST_STEPS and schedule == 1
    assert seconds < 60 * 10
