"""How many optimizer steps fit into the time that ``max_minutes`` gives a run."""

import time

LEAST_STEPS = 5  # of a run, however slow the machine: fewer would be a schedule without a course


class TimeLimit:
    """Plans the steps of a run anew after each, so that the last one ends in time and the schedule ends with it.

    The plan is rank 0's; the others take it over with the numbers that all agree on in a step.

    Args:
        seconds (float): what the run may take, from :func:`set_up` to its last validation.
        began (float): when this process began, by ``clock``.
        spent (float): seconds that the run took before this process went on with it. Default 0.
    """

    clock = staticmethod(time.monotonic)

    def __init__(self, seconds: float, began: float, spent: float = 0.0) -> None:
        self.seconds = seconds
        self._began, self._spent = began, spent
        self._first_step: float | None = None
        self._this_step = 0.0
        self._steps = 0  # of this process
        self._validation_began, self._validation = 0.0, 0.0  # seconds of the last validation: the next takes as long

    def begin_step(self) -> None:
        """Note that a step begins."""
        self._this_step = self.clock()
        if self._first_step is None:
            self._first_step = self._this_step

    def begin_validation(self) -> None:
        """Note that a validation begins."""
        self._validation_began = self.clock()

    def end_validation(self) -> None:
        """Note how long the validation took, which the one after the last step will take too."""
        self._validation = self.clock() - self._validation_began

    def plan(self, step: int, most: int) -> tuple[float, int]:
        """Return the seconds that the run took so far, and the steps that it will have in all.

        The rest of the time is divided by what a step of this process took on average, with the validations and
        checkpoints between steps. No step begins that would end too late if it took as long as the last one.

        Args:
            step (int): steps done, that one included which has just been computed.
            most (int): steps that the data and the config have in all.

        Returns:
            tuple[float, int]: seconds, and at least ``step`` steps; ``step`` itself if the time is up.
        """
        now = self.clock()
        self._steps += 1
        elapsed = self._spent + now - self._began
        average = max((now - self._first_step) / self._steps, 1e-9)
        left = self.seconds - self._validation - elapsed
        more = 0 if left < max(average, now - self._this_step) else int(left / average)
        return elapsed, min(max(step + more, LEAST_STEPS), most)
