"""Folders that are whole when they bear their name: written beside it, flushed to disk, renamed.

``step_40.partial`` is being written, ``step_40.old`` is what a new ``step_40`` is about to replace,
``step_40.deleted`` is being deleted, and ``step_40.damaged`` was found damaged when a run was resumed.
``replaced_step_40`` is of an earlier run, which this one was told to overwrite. A tool, which writes where it is told,
keeps to hidden names of its own.
"""

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

PARTIAL, OLD, DELETED, DAMAGED = ".partial", ".old", ".deleted", ".damaged"
REPLACED = "replaced_"


def partial(folder: Path) -> Path:
    """Return where ``folder`` is written until it is whole."""
    return folder.with_name(folder.name + PARTIAL)


def publish(written: Path, folder: Path, previous_run: list[Path], old: Path | None = None) -> None:
    """Rename ``written`` to ``folder`` once all of it is on the disk; an older one of that name is replaced.

    Args:
        written (Path): the folder, whole, on the same disk.
        folder (Path): its name.
        previous_run (list[Path]): the folders of an earlier run, which the first of this one replaces; the list is
            emptied. They lose their names before, so that none of them is ever taken for this run's, and are deleted
            after.
        old (Path | None): where an older ``folder`` stays meanwhile; None: beside it, with :data:`OLD`.
    """
    old = old or folder.with_name(folder.name + OLD)
    flush(written)
    replaced = []
    while previous_run:
        aside = previous_run[0].with_name(REPLACED + previous_run[0].name)
        if aside.exists():
            shutil.rmtree(aside)
        replaced.append(previous_run[0].rename(aside))
        del previous_run[0]
    if folder.exists():
        folder.rename(old)
    try:
        written.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    flush_file(folder.parent)
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


def write_text(file: Path, text: str) -> None:
    """Replace a file by a text, see :func:`write_bytes`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Replace a file, which is whole at any moment: written beside it, flushed to disk, renamed."""
    beside = file.with_name(f".{file.name}.{os.getpid()}{PARTIAL}")
    beside.write_bytes(content)
    flush_file(beside)
    beside.replace(file)
    flush_file(file.parent)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder} could not be deleted ({error}): delete it by hand.", stacklevel=3)


def flush(folder: Path) -> None:
    """Flush every file and folder below ``folder`` to the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            flush_file(Path(path) / name)
        flush_file(Path(path))


@contextlib.contextmanager
def discarded_on_failure(folder: Path) -> Iterator[None]:
    """Delete ``partial(folder)`` if the block fails: its space is needed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial(folder), ignore_errors=True)
        raise


def flush_file(path: Path) -> None:
    """Flush one file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def complete_folder(output_dir: str | Path, source: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``output_dir`` that takes its name when the block ends without an error.

    An error or an interruption, inside the block or while the folders change places, leaves ``output_dir`` as it was.
    The files get the mode that the umask gives new files.

    Args:
        output_dir (str | Path): Checkpoint folder to create. Its parents are created too.
        source (str | Path): File or folder that the new one is made from.
        overwrite (bool): Replace an existing checkpoint folder. Default False.

    Yields:
        Path: The folder to write into.

    Raises:
        ValueError: If :func:`check_output_dir` refuses ``output_dir``.
    """
    output_dir = check_output_dir(output_dir, source, overwrite=overwrite)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    new, old = scratch / "new", scratch / "old"  # a name beside it could be another of the user's folders
    try:
        new.mkdir()
        yield new
        file_mode = new.stat().st_mode & 0o666  # 0666 less the umask; safetensors writes 0600
        for file in new.rglob("*"):
            if file.is_file():
                file.chmod(file_mode)
        publish(new, output_dir, [], old)
    finally:
        if output_dir.exists() or not old.exists():  # else it could not be moved back
            shutil.rmtree(scratch, ignore_errors=True)


def check_output_dir(output_dir: str | Path, source: str | Path, *, overwrite: bool) -> Path:
    """Return the absolute path of ``output_dir`` if a checkpoint folder made from ``source`` may be put there.

    Raises:
        ValueError: If ``output_dir`` is a file, holds ``source`` or the current folder, holds something that is no
            checkpoint, or holds a checkpoint and ``overwrite`` is False.
    """
    output_dir, source = Path(output_dir).resolve(), Path(source)
    if any(place.is_relative_to(output_dir) for place in (source.resolve(), source.parent.resolve())):  # links too
        raise ValueError(
            f"Expected an output folder that does not hold the source {source}, but got {output_dir}; choose another."
        )
    if Path.cwd().is_relative_to(output_dir):  # a folder in use cannot change places
        raise ValueError(
            f"Expected an output folder apart from the current one, but got {output_dir}; "
            "name a new folder or start from another one."
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"Expected an output folder, but {output_dir} is a file; choose another path.")
    if output_dir.exists() and any(output_dir.iterdir()):
        if not (output_dir / "config.json").is_file():
            raise ValueError(
                f"Expected a new output folder or a checkpoint to replace, but {output_dir} holds other files and no "
                "config.json; choose another one."
            )
        if not overwrite:
            raise ValueError(
                f"The output folder {output_dir} already holds files; choose another one or pass overwrite=True."
            )
    return output_dir
