"""When a run writes a checkpoint, and what it writes about itself into the manifest."""

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtune_kd._versions import installed_versions
from torchtune_kd.checkpoints import folders
from torchtune_kd.checkpoints.progress import Progress
from torchtune_kd.checkpoints.writer import SnapshotWriter
from torchtune_kd.config.metrics import lower_is_better
from torchtune_kd.config.reading import Config
from torchtune_kd.distributed.world import World
from torchtune_kd.storage.manifest import Manifest


class Saver:
    """Writes the checkpoints of one run into its output folder.

    Args:
        config (Config): the run's.
        world (World): all its processes call every method together.
        say (Callable[[str], None]): tells the user what went wrong.
        announce (Callable[[str], None]): told of ``save``, ``manifest`` and ``rename``.
        log_file (str | None): where the run logs.
        output (Path): where the ``step_<n>`` go.
        previous_run (list[Path]): what an earlier run left there.
        seed (int): the seed in use.
        identity (dict[str, dict[str, Any]]): see :mod:`torchtune_kd.checkpoints.identity`; rank 0's counts.
        written (Progress | None): what the checkpoint with which the run goes on has saved.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        say: Callable[[str], None],
        announce: Callable[[str], None],
        log_file: str | None,
        output: Path,
        previous_run: list[Path],
        seed: int,
        identity: dict[str, dict[str, Any]],
        written: Progress | None,
    ) -> None:
        settings = config.settings
        self._settings, self._world, self._log_file = settings, world, log_file
        self._output, self._seed, self._identity = output, seed, identity
        self._config, self._versions = config.resolved, installed_versions()
        self._lower = settings.keep_best is not None and lower_is_better(config, settings.keep_best)
        self._on_disk = None if written is None else _state(written)
        self._undo: tuple[Progress, float | None] | None = None  # if what is being written fails
        self._writer = SnapshotWriter(
            output,
            world,
            previous_run=previous_run,
            keep_last_n=settings.keep_last_n,
            is_better=self._is_better if settings.keep_best is not None else None,
            in_background=settings.enable_async_checkpointing,
            say=say,
            announce=announce,
        )

    def is_due(self, progress: Progress, validation: dict[str, float] | None) -> bool:
        """After every ``save_every_n_steps``-th step and after a validation better than all before; once."""
        if progress.global_step == 0 or self.is_written(progress):
            return False
        every = self._settings.save_every_n_steps
        return (every is not None and progress.global_step % every == 0) or self._is_best(progress, validation)

    @property
    def has_written(self) -> bool:
        """Return whether there is a checkpoint to go on with, if this run should be killed."""
        return self._on_disk is not None

    def is_written(self, progress: Progress) -> bool:
        """Return whether the last checkpoint is of this very moment."""
        return self._on_disk == _state(progress)

    def save(
        self, state: dict[str, Any], progress: Progress, validation: dict[str, float] | None, *, wait: bool = False
    ) -> bool:
        """Write ``step_<n>``, in the background if the config says so and not ``wait``.

        Returns:
            bool: False if it could not be written, which of one in the background shows at :meth:`finish`.
        """
        self.finish()
        self._undo = progress, progress.best
        if self._is_best(progress, validation):
            progress.best = validation[self._settings.keep_best]
        manifest = Manifest(
            progress=progress.to_dict(),
            seed=self._seed,
            processes=self._world.size,
            identity=self._identity,
            config=self._config,
            versions=self._versions,
            saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            validation=validation,
            log_file=self._log_file,
        )
        self._on_disk = _state(progress)
        self._writer.write(state, manifest)
        return self.finish() if wait or not self._settings.enable_async_checkpointing else True

    def finish(self) -> bool:
        """Wait for what is being written in the background; False if the last checkpoint could not be written."""
        good = self._writer.finish()
        if not good and self._undo is not None:
            (progress, best), self._undo = self._undo, None
            progress.best, self._on_disk = best, None
        return good

    def folder(self, step: int) -> Path:
        return folders.step_folder(self._output, step)

    def close(self) -> None:
        """Wait for what is being written."""
        self._writer.close()

    def _is_best(self, progress: Progress, validation: dict[str, float] | None) -> bool:
        if self._settings.keep_best is None or validation is None:
            return False
        value = validation[self._settings.keep_best]
        if progress.best is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < progress.best if self._lower else value > progress.best

    def _is_better(self, one: Manifest, other: Manifest) -> bool:
        value, other_value = (manifest.validation.get(self._settings.keep_best) for manifest in (one, other))
        # none: from before keep_best named this metric; nor is what is not finite ever the best
        known, other_known = (v is not None and math.isfinite(v) for v in (value, other_value))
        if not (known and other_known):
            return known
        return value < other_value if self._lower else value > other_value


def _state(progress: Progress) -> tuple[int, bool]:
    """Tell moments of a run apart: between two steps only a validation can happen."""
    return progress.global_step, progress.validation_pending
