"""Checkpoint folders that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
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
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        file_mode = new.stat().st_mode & 0o666  # 0666 less the umask; safetensors writes 0600
        for file in new.rglob("*"):
            if file.is_file():
                file.chmod(file_mode)
        if output_dir.exists():
            os.replace(output_dir, old)
        os.replace(new, output_dir)
    finally:
        if old.exists() and not output_dir.exists():
            os.replace(old, output_dir)
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
