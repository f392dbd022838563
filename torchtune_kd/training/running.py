"""The frame around a run's steps."""

import contextlib
from collections.abc import Iterator

from torchtune_kd.training.evaluate import validate_if_due
from torchtune_kd.training.run import Run
from torchtune_kd.training.save import checkpoint_if_due


@contextlib.contextmanager
def running(run: Run) -> Iterator[None]:
    """Validate before the first step; then profile, and listen for signals that ask the run to stop."""
    with run.stop_requests:
        validate_if_due(run)
        checkpoint_if_due(run)
        run.profiler.start()
        yield
        run.profiler.stop()
