"""The demo's time, and what fits into it.

What takes long stops by the clock, and estimates only make plans. The one exception is the run that writes a cache: it
has no time limit, and an estimate decides how much of the text it is given.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

SECONDS = 320  # that the demo aims at; what no clock bounds (imports, exports, files) has the rest of six minutes
CHOOSING = 20  # seconds to measure layers in
MEASURING = 25  # seconds for what follows the training
MOST_STEPS = 600
WARM_UP = 0.1  # share of the steps

_AROUND_TRAINING = 12  # seconds of imports and export of the training process, which its own time limit does not count
_VALIDATION = 0.06  # share of the training's time that one validation may take
_LEAST_ROWS = 2  # to validate on
# Seconds as multiples of what the teacher's layers take to read as many tokens. Plans alone follow from these three.
_STEP, _CACHED_STEP, _VALIDATING = 5.5, 4.2, 2.8
_CACHING = 1.3  # likewise; the time of the caching run follows from this alone
_SHARE_OF_CACHE = 0.3  # of the time that is left, for running the teacher once

T = TypeVar("T")


class Deadline:
    """The time by which the demo aims to end, counted from the making of this object."""

    clock = staticmethod(time.monotonic)

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._start = self.clock()

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self.clock() - self._start

    def left(self) -> float:
        """Return the seconds until the end, negative once it has passed."""
        return self.seconds - self.elapsed()

    def within(self, seconds: float, items: Iterable[T]) -> Iterator[T]:
        """Yield the first item, and more while ``seconds`` from now suffice for one like the slowest so far."""
        end, slowest, begin = self.clock() + seconds, 0.0, self.clock()
        for item in items:
            if slowest and begin + slowest > end:
                return
            yield item
            now = self.clock()
            slowest, begin = max(slowest, now - begin), now


@dataclass(frozen=True)
class TrainingPlan:
    """Hold what the training is told.

    Attributes:
        minutes (float): The run's ``max_minutes``.
        validation_rows (int): Rows of held-out text to validate on.
        validate_every (int): Steps from one validation to the next.
    """

    minutes: float
    validation_rows: int
    validate_every: int


def cached_rows(deadline: Deadline, pace: float, *, rows: int, row_tokens: int) -> int:
    """Return how many of the training text's rows the teacher can read once in its share of the time that is left.

    Args:
        deadline (Deadline): Of the demo.
        pace (float): Seconds that the teacher's layers take a token.
        rows (int): Rows of training text that there are.
        row_tokens (int): Tokens of such a row.
    """
    seconds = _SHARE_OF_CACHE * deadline.left() - _AROUND_TRAINING
    return min(rows, max(int(seconds / (_CACHING * pace * row_tokens)), _LEAST_ROWS))


def plan_training(
    deadline: Deadline,
    pace: float,
    *,
    step_tokens: int,
    rows: int,
    row_tokens: int,
    validations: int,
    cached: bool = False,
) -> TrainingPlan:
    """Give the training the time that is left but for measuring, and validation its share of that.

    Args:
        deadline (Deadline): Of the demo.
        pace (float): Seconds that the teacher's layers take a token.
        step_tokens (int): Tokens of an optimizer step.
        rows (int): Rows of held-out text that there are.
        row_tokens (int): Tokens of such a row.
        validations (int): Validations to aim at while training, the last one after it.
        cached (bool): Whether the teacher has run before.
    """
    seconds = max(deadline.left() - MEASURING - _AROUND_TRAINING, 1.0)
    row = _VALIDATING * pace * row_tokens
    kept = min(rows, max(int(_VALIDATION * seconds / row), _LEAST_ROWS))
    step = (_CACHED_STEP if cached else _STEP) * pace * step_tokens
    steps = (seconds - (validations + 1) * kept * row) / step
    steps = min(max(steps, validations), MOST_STEPS)
    # half an interval before the end, lest a validation a few steps before the last one takes these steps' time
    return TrainingPlan(seconds / 60, kept, math.ceil(steps / (validations - 0.5)))
