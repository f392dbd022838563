"""Find where each document of a cache lies."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from torchtune_kd.caches.layout import SHARDS
from torchtune_kd.caches.shards import Table, positions_of, read_header, read_table
from torchtune_kd.data.documents import KEY_BYTES
from torchtune_kd.storage.atomic import write_bytes

_FIELDS = ("start", "count", "crc32", "marked")


class Place(NamedTuple):
    """Say where a document lies, and what is known of it."""

    shard: int
    start: int  # row
    count: int  # rows
    crc32: int
    positions: np.ndarray  # [count] int64


class Index:
    """Find documents by their keys.

    Args:
        table (Table): of all documents, in the order of their keys, each once.
        shard (np.ndarray): [n], the number of each one's shard.
    """

    def __init__(self, table: Table, shard: np.ndarray) -> None:
        self._table, self._shard = table, shard
        self._keys = _comparable(table.key)
        self._begins = np.cumsum(table.marked) - table.marked

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def tokens(self) -> int:
        """Count the stored tokens."""
        return int(self._table.count.sum())

    def find(self, key: bytes) -> Place | None:
        """Return where a document lies; None if it is not there."""
        wanted = np.array([key], dtype=self._keys.dtype)
        at = int(np.searchsorted(self._keys, wanted)[0])
        if at == len(self._keys) or self._keys[at] != wanted[0]:
            return None
        table, begin = self._table, int(self._begins[at])
        marks = table.marks[begin : begin + int(table.marked[at])]
        return Place(
            int(self._shard[at]), int(table.start[at]), int(table.count[at]), int(table.crc32[at]), positions_of(marks)
        )

    def holds(self, key: bytes, positions: np.ndarray) -> bool:
        """Return whether a document is there with all of these positions."""
        place = self.find(key)
        if place is None or len(place.positions) < len(positions):
            return False
        if len(place.positions) == len(positions):
            return bool(np.array_equal(place.positions, positions))
        return bool(np.isin(positions, place.positions, assume_unique=True).all())

    @classmethod
    def of_shards(cls, folder: Path, names: Sequence[str]) -> "Index":
        """Put together the index of shards by their names; of a document that lies in two, the one with more rows."""
        tables = [read_table(folder / SHARDS / name) for name in names]
        empty = np.zeros((0, KEY_BYTES), np.uint8)
        keys = np.concatenate([empty, *(table.key for table in tables)])
        shard = np.concatenate([np.full(len(table.key), at) for at, table in enumerate(tables)] or [np.zeros(0)])
        joined = {
            name: np.concatenate([np.zeros(0, np.int64), *(getattr(table, name) for table in tables)])
            for name in _FIELDS
        }
        begins = np.cumsum(joined["marked"]) - joined["marked"]
        marks = np.concatenate([np.zeros(0, np.uint8), *(table.marks for table in tables)])
        comparable = _comparable(keys)
        order = np.lexsort((-joined["count"], comparable)) if len(keys) else np.zeros(0, np.int64)
        first = np.ones(len(order), dtype=bool)
        first[1:] = comparable[order][1:] != comparable[order][:-1]
        kept = order[first]
        parts = [marks[begins[at] : begins[at] + joined["marked"][at]] for at in kept]
        table = Table(
            key=keys[kept],
            marks=np.concatenate([np.zeros(0, np.uint8), *parts]),
            **{name: values[kept] for name, values in joined.items()},
        )
        return cls(table, shard[kept].astype(np.int64))

    def write(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """Write the index into ``folder`` under a name of its own, and return that with ``bytes`` and ``sha256``."""
        tensors = {name: torch.from_numpy(np.array(values)) for name, values in self._table._asdict().items()}
        content = save({**tensors, "shard": torch.from_numpy(self._shard.copy())}, metadata={"cache": "{}"})
        digest = hashlib.sha256(content).hexdigest()
        name = f"index-{digest[:16]}.safetensors"
        write_bytes(folder / name, content)
        return name, {"bytes": len(content), "sha256": digest}

    @classmethod
    def read(cls, file: Path) -> "Index":
        """Read what :meth:`write` wrote."""
        columns, _ = read_header(file)
        shard = np.fromfile(file, "<i8", -1, offset=columns["shard"].offset)
        table = read_table(file)
        return cls(table, shard[: len(table.key)])


def whole_shards(folder: Path) -> list[str]:
    """Return the names of the shards in a cache's folder that are whole, in order."""
    return sorted(file.name for file in (folder / SHARDS).glob("*.safetensors"))


def _comparable(keys: np.ndarray) -> np.ndarray:
    """Return keys [n, 16] as [n] strings of bytes, which NumPy orders and searches."""
    return np.ascontiguousarray(keys).reshape(-1).view(f"S{KEY_BYTES}")
