"""The demo's output folder, and how the demo ends early."""

import shutil
from dataclasses import dataclass
from pathlib import Path


class DemoError(Exception):
    """Ends the demo with one sentence for the user and an exit code."""

    def __init__(self, sentence: str, exit_code: int = 2) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass(frozen=True)
class OutputFolder:
    """Names of what the demo writes; nothing else in the folder is ever touched."""

    path: Path

    @property
    def train_text(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def held_out_text(self) -> Path:
        return self.path / "val.jsonl"

    @property
    def untrained(self) -> Path:
        return self.path / "student-untrained"

    @property
    def trained(self) -> Path:
        return self.run / "epoch_0"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def _unfinished(self) -> Path:
        return self.path / ".unfinished"

    def claim(self, *, overwrite: bool) -> None:
        """Create the folder, or clear what an interrupted demo (with ``overwrite``: a finished one) left in it.

        Raises:
            DemoError: if the folder holds anything else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DemoError(f"Expected a folder under --output-dir, but {self.path} is a file: choose another path.")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._unfinished.exists():
            if not self.results.exists():
                raise DemoError(f"The folder {self.path} holds files of something else: choose another --output-dir.")
            if not overwrite:
                raise DemoError(
                    f"The folder {self.path} already holds a finished demo: pass --overwrite to replace it, or "
                    "choose another --output-dir."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._unfinished.touch()
        for path in (self.train_text, self.held_out_text, self.curves, self.results):
            path.unlink(missing_ok=True)
        for path in (self.untrained, self.run):
            if path.exists():
                shutil.rmtree(path)

    def finish(self) -> None:
        """Mark the folder as that of a finished demo."""
        self._unfinished.unlink()
