"""The end of writing a cache: its index, then its manifest."""

import errno
import os
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torchtune_kd._versions import installed_versions
from torchtune_kd.caches.index import Index
from torchtune_kd.caches.layout import SHARDS, CacheManifest, shards_of
from torchtune_kd.errors import RunError, first_line

VISIBLE_WITHIN = 90.0  # seconds; NFS asks the server again for what it believes to be missing after 60 at most
_EVERY = 0.5
_NOT_YET = (errno.ENOENT, errno.ESTALE)  # of a name, and of a folder that was seen before it was made anew


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, dict[str, Any]]) -> None:
    """Write index and manifest of a folder whose shards, and other ``files``, are whole; older indices go.

    The shards are those that ``files`` names, whatever a listing of the folder shows.

    Args:
        folder (Path): the cache's.
        facts (Mapping[str, Any]): the fields of :class:`CacheManifest` that do not follow from the shards.
        files (Mapping[str, dict[str, Any]]): ``bytes`` and ``sha256`` of every shard and of the head.

    Raises:
        RunError: if a shard cannot be seen, as :func:`wait_for_files`, or read.
        OSError: if they cannot be written.
    """
    shards = shards_of(files)
    try:
        wait_for_files(folder, [f"{SHARDS}/{name}" for name in shards])
        index = Index.of_shards(folder, shards)
    except OSError as error:
        raise unreadable(folder, error) from error
    name, file = index.write(folder)
    CacheManifest(
        **facts,
        documents=len(index),
        tokens=index.tokens,
        versions=installed_versions(),
        written_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        index=name,
        files={**files, name: file},
    ).write(folder)
    for old in folder.glob("index-*.safetensors"):
        if old.name != name:
            old.unlink()


def unreadable(folder: Path, error: Exception) -> RunError:
    """Return the error of a cache of which a file that is there cannot be read."""
    return RunError(f"The cache in {folder} cannot be read ({first_line(error)}): start again with the same command.")


def wait_for_files(folder: Path, names: Iterable[str]) -> None:
    """Wait until files that other processes have written can be opened by this one.

    On a network file system a listing, and the answer that a name is missing, may be as old as its caches let it be.

    Args:
        folder (Path): of a cache.
        names (Iterable[str]): of its files.

    Raises:
        RunError: naming the first that cannot be opened after :data:`VISIBLE_WITHIN`.
    """
    deadline = time.monotonic() + VISIBLE_WITHIN
    for name in names:
        while not _is_visible(folder / name):
            if time.monotonic() > deadline:
                raise RunError(
                    f"The file {name}, which another process has written into {folder}, cannot be seen here after "
                    f"{VISIBLE_WITHIN:.0f} s: put `cache.folder` on a file system that all nodes share, and start "
                    "again with the same command, which writes what is missing."
                )
            time.sleep(_EVERY)


def _is_visible(file: Path) -> bool:
    """Return whether a file can be opened; opening its folder lets a network file system look anew."""
    try:
        for path in (file.parent, file):
            os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        if error.errno in _NOT_YET:
            return False
        raise
    return True
