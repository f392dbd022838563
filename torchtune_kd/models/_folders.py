"""Output folders that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(output_dir: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``output_dir`` that takes its name when the block ends without an
    error.

    An error or an interruption inside the block leaves ``output_dir`` as it was.

    Args:
        output_dir (str | Path): Folder to create. Its parents are created too.
        overwrite (bool): Replace an existing folder. Default False.

    Yields:
        Path: The folder to write into.

    Raises:
        ValueError: If ``output_dir`` exists, is not an empty folder, and ``overwrite`` is False.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir, overwrite=overwrite)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    staged = scratch / output_dir.name
    try:
        staged.mkdir()
        yield staged
        if overwrite and output_dir.exists():
            os.replace(output_dir, scratch / "replaced")
        os.replace(staged, output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Raise a ValueError if writing ``output_dir`` would replace something without leave to."""
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise ValueError(f"Expected an output folder, but {output_dir} is a file; choose another path.")
    if any(output_dir.iterdir()) and not overwrite:
        raise ValueError(
            f"The output folder {output_dir} already holds files; choose another one or pass overwrite=True."
        )
