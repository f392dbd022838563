"""The demo's output folder, and how the demo ends early."""

import shutil
from pathlib import Path


class DemoError(Exception):
    """Ends the demo with one sentence for the user and an exit code."""

    def __init__(self, sentence: str, exit_code: int = 2) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class OutputFolder:
    """Names of what the demo writes; nothing else in the folder is ever touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.train_text, self.held_out_text = path / "train.jsonl", path / "val.jsonl"
        self.untrained, self.run, self.cache = path / "student-untrained", path / "run", path / "cache"
        self.trained = self.run / "epoch_0"
        self.curves, self.results = path / "curves.png", path / "results.json"
        self._unfinished = path / ".unfinished"

    def check(self, *, overwrite: bool) -> None:
        """See that the folder may be claimed; nothing is written.

        Raises:
            DemoError: if the folder holds anything but an interrupted demo (with ``overwrite``: a finished one).
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise DemoError(
                    f"Expected a folder under --output-dir, but {self.path} is a file: choose another path."
                )
            if not self.path.is_dir() or not any(self.path.iterdir()) or self._unfinished.exists():
                return
            if not self.results.exists():
                raise DemoError(f"The folder {self.path} holds files of something else: choose another --output-dir.")
        except OSError as error:
            raise self._unusable(error) from error
        if not overwrite:
            raise DemoError(
                f"The folder {self.path} already holds a finished demo: pass --overwrite to replace it, or "
                "choose another --output-dir."
            )

    def claim(self, *, overwrite: bool) -> None:
        """Create the folder, or clear what an interrupted demo (with ``overwrite``: a finished one) left in it.

        Raises:
            DemoError: if the folder holds anything else, or cannot be written.
        """
        self.check(overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._unfinished.touch()
            for path in (self.train_text, self.held_out_text, self.curves, self.results):
                path.unlink(missing_ok=True)
            for path in (self.untrained, self.run, self.cache):
                if path.exists():
                    shutil.rmtree(path)
        except OSError as error:
            raise self._unusable(error) from error

    def finish(self) -> None:
        """Mark the folder as that of a finished demo."""
        self._unfinished.unlink()

    def _unusable(self, error: OSError) -> DemoError:
        reason = error.strerror or error
        return DemoError(
            f"Expected an --output-dir that can be written, but {self.path} cannot ({reason}): choose another folder."
        )
