"""Runs the parts of sections as processes and gathers what they write."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ._job import CHECKOUT, Job, Row, read_rows
from ._sections import Section

GRACE = 8.0  # seconds between the time that a part is told and its end by force
TICK = 0.25
PROGRESS = 10.0  # seconds between two reports of what a running part has found


class Outcome(NamedTuple):
    """Hold what became of one section.

    Attributes:
        state (str): done, skipped, failed, cut where the time ended it, or running.
        why (str): a sentence where it is not done.
        seconds (float): that it took.
        rows (list[Row]): what it found.
    """

    state: str
    why: str
    seconds: float
    rows: list[Row]


class _Part:
    """The process of one part."""

    def __init__(self, job: Job, environment: dict[str, str]) -> None:
        self.job, self.killed = job, False
        self.started, self.ended = time.monotonic(), None
        folder = Path(job.folder)
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps(job._asdict()))
        self._output = folder / "output.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu._worker", str(folder / "job.json")],
                cwd=CHECKOUT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it can be ended together with what it starts
                env=environment,
            )

    def has_ended(self) -> bool:
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.monotonic()
        return self.ended is not None

    def kill(self) -> None:
        if self.process.poll() is None:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self._output.read_text(errors="replace").splitlines() if line.strip()]
        return (lines or ["no message"])[-1][:300]


def run_group(
    sections: list[Section],
    *,
    device: str,
    rehearse: bool,
    end: float,
    folder: Path,
    facts: dict[str, Any],
    parallel: int,
    progress: Callable[[dict[str, Outcome]], None],
) -> dict[str, Outcome]:
    """Run the parts of sections that may run together and return what became of each section.

    Args:
        sections (list[Section]): one, or several that allow it.
        device (str): ``cuda`` or ``cpu``.
        rehearse (bool): tiny shapes.
        end (float): by ``time.monotonic``, when all is to be over.
        folder (Path): for what the parts write.
        facts (dict): for the jobs.
        parallel (int): parts at a time.
        progress (Callable): called with the outcomes so far whenever a part has ended, and in between.
    """
    waiting = [(section, part) for section in sections for part in section.module.PARTS]
    running: list[_Part] = []
    ended: list[_Part] = []
    told = time.monotonic()

    def outcomes() -> dict[str, Outcome]:
        over = not waiting and not running
        parts = {s.name: [part for part in ended + running if part.job.section == s.name] for s in sections}
        return {s.name: _outcome(s, parts[s.name], over) for s in sections}

    try:
        while waiting or running:
            while waiting and len(running) < (parallel if sections[0].parallel else 1) and time.monotonic() < end:
                section, part = waiting.pop(0)
                left = end - time.monotonic() - GRACE
                where = folder / f"{section.name}-{part or 'all'}"
                job = Job(section.name, part, device, rehearse, max(left, 1.0), str(where), facts)
                running.append(_Part(job, _environment(job)))
            if time.monotonic() >= end:
                waiting.clear()
                for part in running:
                    part.kill()
            finished = [part for part in running if part.has_ended()]
            running = [part for part in running if part not in finished]
            ended += finished
            if finished or time.monotonic() - told > PROGRESS:
                told = time.monotonic()
                progress(outcomes())
            elif running:
                time.sleep(TICK)
    finally:
        for part in running:
            part.kill()
    return outcomes()


def _outcome(section: Section, parts: list[_Part], over: bool) -> Outcome:
    rows, whys, states = [], [], set()
    for name, part in _by_name(section, parts):
        label = f"{name}: " if name else ""
        if part is None and not over:
            states.add("running")
            continue
        if part is None:
            states.add("cut")
            whys.append(f"{label}not started, the time was up")
            continue
        found = read_rows(part.job)
        ends = [row for row in found if "skipped" in row or "failed" in row]
        rows += [row for row in found if row not in ends]
        if part.process.poll() is None:
            states.add("running")
        elif part.killed:
            states.add("cut")
            whys.append(f"{label}ended when its time was up")
        elif ends and "skipped" in ends[0]:
            states.add("skipped")
            whys.append(label + ends[0]["skipped"])
        elif ends or part.process.returncode:
            states.add("failed")
            code = part.process.returncode
            whys.append(label + (ends[0]["failed"] if ends else f"ended with {code}: {part.last_line}"))
        else:
            states.add("done")
    now = time.monotonic()
    seconds = max((p.ended or now for p in parts), default=now) - min((p.started for p in parts), default=now)
    state = next(state for state in ("running", "failed", "cut", "done", "skipped") if state in states)
    return Outcome(state, "; ".join(dict.fromkeys(whys)), seconds, rows)


def _by_name(section: Section, parts: list[_Part]) -> Iterator[tuple[str, _Part | None]]:
    found = {part.job.part: part for part in parts}
    yield from ((name, found.get(name)) for name in section.module.PARTS)


def _environment(job: Job) -> dict[str, str]:
    """Return the environment of a part: as it is, with Triton's interpreter where there is no GPU."""
    changed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if job.section == "kernels":  # what PyTorch asks of cuBLAS under deterministic algorithms
        changed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if job.device == "cpu":
        changed |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | changed
