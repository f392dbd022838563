"""A cache's folder, written beside its name and renamed once it is whole."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtune_kd.caches.layout import SHARDS
from torchtune_kd.caches.shards import Entry, write_shard
from torchtune_kd.errors import UserError
from torchtune_kd.storage.atomic import discarded_on_failure, partial, publish

_SHARD_BYTES = 512 * 2**20


class Shards:
    """Gather entries, and write them as shards.

    Args:
        folder (Path): of the cache.
        facts (Mapping[str, Any]): what each shard says of its cache.

    Attributes:
        files (dict[str, dict[str, Any]]): ``bytes`` and ``sha256`` of those that are written, by name.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self._folder, self._facts = folder / SHARDS, facts
        self._entries: list[Entry] = []
        self._bytes = 0
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, entry: Entry) -> None:
        """Take an entry, and write those that have come if they are enough for a shard."""
        self._entries.append(entry)
        self._bytes += entry.nbytes
        if self._bytes >= _SHARD_BYTES:
            self.finish()

    def finish(self) -> None:
        """Write what is left."""
        if self._entries:
            name, file = write_shard(self._folder, self._entries, self._facts)
            self.files[f"{SHARDS}/{name}"] = file
        self._entries, self._bytes = [], 0


@contextlib.contextmanager
def new_cache(output: Path, source: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside ``output`` that takes its name when the block ends without an error.

    Raises:
        UserError: if ``output`` is there and may not be replaced.
    """
    output = output.resolve()
    if source.resolve().is_relative_to(output):
        raise UserError(f"Expected an output folder that does not hold {source}, but got {output}: choose another.")
    if output.exists() and not output.is_dir():
        raise UserError(f"Expected an output folder, but {output} is a file: choose another path.")
    if output.exists() and any(output.iterdir()):
        if not (output / SHARDS).is_dir():
            raise UserError(
                f"Expected a new output folder or a cache to replace, but {output} holds other files: choose another."
            )
        if not overwrite:
            raise UserError(f"The output folder {output} already holds a cache: choose another or pass --overwrite.")
    written = partial(output)
    shutil.rmtree(written, ignore_errors=True)
    with discarded_on_failure(output):
        (written / SHARDS).mkdir(parents=True)
        yield written
        publish(written, output, [])
