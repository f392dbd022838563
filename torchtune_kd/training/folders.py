"""Folders that are whole when they bear their name: written beside it, flushed to disk, renamed.

``step_40.partial`` is being written, ``step_40.old`` is what a new ``step_40`` is about to replace,
``step_40.deleted`` is being deleted, and ``step_40.damaged`` was found damaged when a run was resumed.
``replaced_step_40`` is of an earlier run, which this one was told to overwrite.
"""

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

STEP = re.compile(r"step_(\d+)")
PARTIAL, OLD, DELETED, DAMAGED = ".partial", ".old", ".deleted", ".damaged"
REPLACED = "replaced_"
_OF_A_RUN = re.compile(r"(step|epoch)_\d+")
_HALF_DONE = re.compile(r"((?:step|epoch)_\d+)(\.partial|\.old|\.deleted)")


def step_folder(output: Path, step: int) -> Path:
    return output / f"step_{step}"


def step_folders(output: Path) -> list[Path]:
    """The checkpoints in ``output``, newest first."""
    if not output.is_dir():
        return []
    found = {int(match[1]): path for path in output.iterdir() if (match := STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def partial(folder: Path) -> Path:
    """Where ``folder`` is written until it is whole."""
    return folder.with_name(folder.name + PARTIAL)


def publish(written: Path, folder: Path, stale: list[Path]) -> None:
    """Rename ``written`` to ``folder`` once all of it is on the disk; an older one of that name is replaced.

    ``stale`` are the folders of an earlier run, which the first of this one replaces; the list is emptied. They lose
    their names before, so that none of them is ever taken for this run's, and are deleted after.
    """
    old = folder.with_name(folder.name + OLD)
    flush(written)
    replaced = []
    while stale:
        aside = stale[0].with_name(REPLACED + stale[0].name)
        if aside.exists():
            shutil.rmtree(aside)
        replaced.append(stale[0].rename(aside))
        del stale[0]
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    _flush_one(folder.parent)
    for path in (old, *replaced):  # what is written is whole by now, whether or not these go
        if path.exists():
            _remove(path)


def delete(folder: Path) -> None:
    """Take its name from a folder, then delete it: a crash in between leaves no half of it under that name."""
    going = folder.with_name(folder.name + DELETED)
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one and nothing of it is lost."""
    aside = folder.with_name(folder.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)


def clean_up(output: Path) -> None:
    """What a killed run left half done in ``output``: forget what was begun, keep what was about to be replaced."""
    if not output.is_dir():
        return
    paths = sorted(output.iterdir())
    if any(_OF_A_RUN.fullmatch(path.name) for path in paths):  # else nothing has replaced them yet
        for path in paths:
            if path.name.startswith(REPLACED) and _OF_A_RUN.fullmatch(path.name.removeprefix(REPLACED)):
                shutil.rmtree(path)
    for path in paths:
        match = _HALF_DONE.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == OLD and not path.with_name(match[1]).exists():
            path.rename(path.with_name(match[1]))
        else:
            shutil.rmtree(path)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder} could not be deleted ({error}): delete it by hand.", stacklevel=3)


def flush(folder: Path) -> None:
    """Every file and folder below ``folder``, to the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            _flush_one(Path(path) / name)
        _flush_one(Path(path))


@contextlib.contextmanager
def discarded_on_failure(folder: Path) -> Iterator[None]:
    """A block that fails leaves no ``partial(folder)``: its space is needed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial(folder), ignore_errors=True)
        raise


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
