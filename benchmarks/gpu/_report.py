"""The report, whole on disk after each section: Markdown for people, JSON for programs."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from ..losses._report import commit, markdown_table
from ._job import Row
from ._runner import Outcome
from ._sections import find


class Report:
    """Keep what a run has found so far, in two files that are replaced whole.

    Args:
        folder (Path): for the files; made if it is not there.
        command (str): that was typed.
        started (datetime): when.
        rehearsal (bool): whether the shapes are tiny ones.
        names (list[str]): the sections that were asked for.
    """

    def __init__(self, folder: Path, command: str, started: datetime, rehearsal: bool, names: list[str]) -> None:
        self._folder, self._command, self._started, self._rehearsal = folder, command, started, rehearsal
        self._commit = commit()
        self._names = names
        self._outcomes: dict[str, Outcome] = {}
        self._stem: str | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what later sections and the tables need of earlier ones."""
        machine = self._outcomes.get("machine")
        found = find("machine").module.facts(machine.rows) if machine else {}
        plan = self._outcomes.get("plan")
        return found | ({"plan": plan.rows} if plan else {})

    @property
    def problems(self) -> list[str]:
        """Lines for what failed, and for what is not as expected."""
        lines = []
        for name, outcome in self._outcomes.items():
            if outcome.state == "failed":
                lines.append(f"{name}: {outcome.why}")
            lines += [f"{name}: {line}" for line in find(name).module.problems(outcome.rows)]
        return lines

    def update(self, outcomes: dict[str, Outcome]) -> None:
        """Take in what became of some sections and write both files."""
        self._outcomes |= outcomes
        if self._stem is None:
            self._stem = self._name()
        _replace(self._folder / f"{self._stem}.md", self.markdown())
        _replace(self._folder / f"{self._stem}.json", json.dumps(self.as_dict(), indent=1) + "\n")

    @property
    def files(self) -> list[Path]:
        return [self._folder / f"{self._stem}{suffix}" for suffix in (".md", ".json")]

    def as_dict(self) -> dict[str, Any]:
        return {
            "date": self._started.isoformat(timespec="seconds"),
            "command": self._command,
            "commit": self._commit,
            "rehearsal": self._rehearsal,
            "device": self.facts.get("device"),
            "versions": self.facts.get("versions"),
            "problems": self.problems,
            "sections": {name: outcome._asdict() for name, outcome in self._outcomes.items()},
        }

    def markdown(self) -> str:
        date = self._started.strftime("%Y-%m-%d %H:%M UTC")
        parts = [f"# {'A rehearsal' if self._rehearsal else 'What a GPU confirms'}, {date}"]
        parts.append(f"`{self._command}` at commit {self._commit}")
        if self._rehearsal:
            parts.append("Tiny shapes on a CPU or in Triton's interpreter: that the code runs, and no figure to quote.")
        parts.append(markdown_table(("section", "state", "seconds", ""), [self._line(name) for name in self._names]))
        wrong = self.problems
        if wrong:
            parts.append("Not as expected:\n\n" + "\n".join(f"- {line}" for line in wrong))
        for name, outcome in self._outcomes.items():
            module = find(name).module
            parts.append(f"## {module.TITLE}")
            if outcome.state != "done" and outcome.why:
                parts.append(f"{outcome.state.capitalize()}: {outcome.why}.")
            if outcome.rows:
                parts.append(_rendered(module, outcome.rows, self.facts))
        return "\n\n".join(parts) + "\n"

    def _line(self, name: str) -> tuple[str, str, str, str]:
        outcome = self._outcomes.get(name)
        if outcome is None:
            return name, "to come", "", ""
        return name, outcome.state, f"{outcome.seconds:.0f}", outcome.why[:160]

    def _name(self) -> str:
        device = self.facts.get("name") or self.facts.get("device", "unknown device").split(",")[0]
        plain = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
        kind = "gpu-rehearsal" if self._rehearsal else "gpu"
        return f"{kind}-{self._started.strftime('%Y-%m-%d-%H%M')}-{plain}"


def _rendered(module: Any, rows: list[Row], facts: dict[str, Any]) -> str:
    """Return a section's text; what cannot be shown is still in the JSON file, and the rest of the report stands."""
    try:
        return module.render(rows, facts)
    except Exception as error:
        return f"The rows cannot be shown ({type(error).__name__}: {error}); they are in the JSON file."


def _replace(file: Path, text: str) -> None:
    """Write ``file`` so that a reader sees the old one or the new one, whole."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    os.replace(partial, file)
