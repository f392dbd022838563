"""What a section's process is told, and what it tells."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]
Emit = Callable[[Row], None]


class Skip(Exception):
    """A section, or a part of one, that cannot run here; its text is the reason, a sentence without its end."""


class Job(NamedTuple):
    """One part of a section, run by a process of its own.

    Attributes:
        section (str): its name.
        part (str): the part; "" where a section has one.
        device (str): ``cuda`` or ``cpu``.
        rehearse (bool): tiny shapes.
        seconds (float): the time it has.
        folder (str): a temporary folder of its own.
        facts (dict): what earlier sections found: ``copy_bytes`` and ``matrix_flops`` per second.
    """

    section: str
    part: str
    device: str
    rehearse: bool
    seconds: float
    folder: str
    facts: dict[str, Any]

    @property
    def results(self) -> Path:
        """The file with a row per line, written as they come."""
        return Path(self.folder) / "results.jsonl"


class Clock:
    """Seconds left of a part's time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def write_rows(job: Job) -> Emit:
    """Return a function that appends a row to the job's results at once."""

    def emit(row: Row) -> None:
        with job.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    return emit


def read_rows(job: Job) -> list[Row]:
    """Return the rows written so far; a line that is still being written is left out."""
    if not job.results.is_file():
        return []
    text = job.results.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
