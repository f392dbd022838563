"""Shards, written while the teacher goes on."""

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from torchtune_kd.cache_teacher.documents import Listed
from torchtune_kd.caches.shards import Entry, write_shard
from torchtune_kd.errors import RunError, first_line

LONGEST = 60.0  # seconds of work that a kill may cost: after so many a shard is closed, however small


class ShardWriter:
    """Gather what is to be stored and write it as shards, in a thread; what belongs to a batch stands in one shard.

    Args:
        folder (Path): of the shards.
        shard_bytes (int): after which a shard is closed.
        facts (Mapping[str, Any]): what a shard says of its cache.

    Attributes:
        files (dict[str, dict[str, Any]]): ``bytes`` and ``sha256`` of what this process wrote, by name.
    """

    def __init__(self, folder: Path, shard_bytes: int, facts: Mapping[str, Any]) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self._folder, self._shard_bytes, self._facts = folder, shard_bytes, facts
        self._entries: list[Entry] = []
        self._bytes, self._began = 0, time.monotonic()
        self._on_device: tuple[Sequence[Listed], Mapping[str, Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._writing: Future[tuple[str, dict[str, Any]]] | None = None

    def add(self, documents: Sequence[Listed], columns: Mapping[str, Tensor]) -> None:
        """Take the columns [m, ...] of a batch's documents, one after the other, and fetch those of the batch before.

        A device that has just been given the batch works on it meanwhile.

        Raises:
            RunError: if an earlier shard could not be written.
        """
        self._fetch()
        self._on_device = documents, columns
        if self._bytes >= self._shard_bytes or time.monotonic() - self._began > LONGEST:
            self._begin()

    def finish(self) -> None:
        """Write what is left, and wait for it.

        Raises:
            RunError: if a shard could not be written.
        """
        self._fetch()
        self._begin()
        self._wait()

    def _fetch(self) -> None:
        if self._on_device is None:
            return
        documents, on_device = self._on_device
        self._on_device, begin = None, 0
        columns = {name: column.cpu() for name, column in on_device.items()}
        for document in documents:
            positions = document.positions
            end = begin + len(positions)
            own = {name: column[begin:end].contiguous() for name, column in columns.items()}
            self._entries.append(Entry(document.key, positions, own))
            self._bytes += self._entries[-1].nbytes
            begin = end

    def _begin(self) -> None:
        self._wait()
        if self._entries:
            self._writing = self._thread.submit(write_shard, self._folder, self._entries, self._facts)
        self._entries, self._bytes, self._began = [], 0, time.monotonic()

    def _wait(self) -> None:
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            name, facts = writing.result()
        except OSError as error:
            free = shutil.disk_usage(self._folder).free
            raise RunError(
                f"A shard could not be written into {self._folder} ({first_line(error)}), where {free / 1e9:.1f} GB "
                "are free: make room and start again with the same command, which writes what is missing."
            ) from error
        self.files[name] = facts
