"""Shards: columns of rows, one row per stored token, and the documents that they belong to.

A shard is a safetensors file that bears its name once it is whole. Its name is a hash of what is in it, so that
processes that know nothing of each other never write over one another's, and none over one that is being read. Its
table holds, for n documents:

    key [n, 16] uint8    start, count [n] int64 (rows)    crc32 [n] int64    marked [n] int64 (bytes of its marks)
    marks [sum of marked] uint8: which positions of a document are stored, one bit each

so that the index of a whole cache can be put together from the shards alone.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from torchtune_kd.caches.log_probs import NONE
from torchtune_kd.data.documents import KEY_BYTES
from torchtune_kd.storage.atomic import write_bytes
from torchtune_kd.storage.manifest import Damaged

TABLE = ("key", "start", "count", "crc32", "marked", "marks")
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "<i1", "U8": "<u1", "I32": "<i4", "I64": "<i8"}
TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8,
    "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


class Entry(NamedTuple):
    """Hold what is stored of one document.

    Attributes:
        key (bytes): of the document.
        positions (np.ndarray): [n] int64, which of its tokens.
        columns (dict[str, Tensor]): each [n, ...], on the host.
    """

    key: bytes
    positions: np.ndarray
    columns: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


class Column(NamedTuple):
    """Say where a column of a shard lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of a row
    offset: int  # in bytes, of row 0
    row_bytes: int


class Table(NamedTuple):
    """The documents of a shard, or of a whole cache; see the head of this file."""

    key: np.ndarray
    start: np.ndarray
    count: np.ndarray
    crc32: np.ndarray
    marked: np.ndarray
    marks: np.ndarray


def positions_of(marks: np.ndarray) -> np.ndarray:
    """Return the positions [n] int64 that bits mark."""
    return np.flatnonzero(np.unpackbits(marks, bitorder="little"))


def marks_of(positions: np.ndarray) -> np.ndarray:
    """Return positions (in order) as bits, packed into uint8; the last byte holds the last of them."""
    bits = np.zeros(int(positions[-1]) + 1 if len(positions) else 0, dtype=np.uint8)
    bits[positions] = 1
    return np.packbits(bits, bitorder="little")


def checksum(columns: Mapping[str, memoryview | bytes]) -> int:
    """Return the CRC-32 of a document's columns, each as its bytes, in the order of their names."""
    crc = 0
    for name in sorted(columns):
        crc = zlib.crc32(columns[name], crc)
    return crc


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_shard(folder: Path, entries: Sequence[Entry], facts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Write entries as one shard into ``folder``, and return its name with ``bytes`` and ``sha256``.

    Args:
        folder (Path): exists.
        entries (Sequence[Entry]): at least one, all with the same columns.
        facts (Mapping[str, Any]): what a shard says of the cache it belongs to, kept as its metadata.
    """
    names = sorted(entries[0].columns)
    padded = {name: _of_one_width(name, [entry.columns[name] for entry in entries]) for name in names}
    counts = np.array([len(entry.positions) for entry in entries])
    marks = [marks_of(entry.positions) for entry in entries]
    crcs = [checksum({name: as_bytes(padded[name][at]) for name in names}) for at in range(len(entries))]
    table = {
        "key": np.frombuffer(b"".join(entry.key for entry in entries), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "start": np.cumsum(counts) - counts,
        "count": counts,
        "crc32": np.array(crcs),
        "marked": np.array([len(bits) for bits in marks]),
        "marks": np.concatenate(marks),
    }
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in table.items()}
    for name in names:
        tensors[name] = torch.cat(padded[name])
    content = save(tensors, metadata={"cache": json.dumps(facts, sort_keys=True)})
    digest = hashlib.sha256(content).hexdigest()
    name = f"{digest[:16]}.safetensors"
    write_bytes(folder / name, content)
    return name, {"bytes": len(content), "sha256": digest}


def _of_one_width(name: str, columns: Sequence[Tensor]) -> list[Tensor]:
    """Pad columns of drawn ids, of which each document has its own number, to the widest."""
    if columns[0].dim() != 2:
        return list(columns)
    widest = max(column.shape[1] for column in columns)
    fill = NONE if name == "ids" else 0
    return [torch.nn.functional.pad(column, (0, widest - column.shape[1]), value=fill) for column in columns]


def read_header(file: Path) -> tuple[dict[str, Column], dict[str, Any]]:
    """Return where the columns and the table of a shard lie, and its facts.

    Raises:
        Damaged: if the file is no whole shard.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length < size else b""
    except OSError as error:
        raise Damaged(f"the file {file.name} cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text)
        facts = json.loads(header.pop("__metadata__")["cache"])
        columns = {name: _column(entry, 8 + length) for name, entry in header.items()}
        end = max(8 + length + entry["data_offsets"][1] for entry in header.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"the file {file.name} cannot be read as a shard") from error
    if size != end:
        raise Damaged(f"the file {file.name} has {size} bytes instead of {end}")
    return columns, facts


def _column(entry: Mapping[str, Any], begins: int) -> Column:
    """Return the column that a header describes; ValueError where its numbers contradict each other."""
    dtype, (rows, *shape), (begin, stop) = TORCH[entry["dtype"]], entry["shape"], entry["data_offsets"]
    row_bytes = math.prod(shape) * dtype.itemsize
    if stop - begin != rows * row_bytes:
        raise ValueError(f"{stop - begin} bytes for {rows} rows of {row_bytes}")
    return Column(dtype, tuple(shape), begins + begin, row_bytes)


def read_table(file: Path) -> Table:
    """Return the table of a shard's documents, or that of an index."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        found = {}
        for name in TABLE:
            entry = header[name]
            begin, stop = entry["data_offsets"]
            opened.seek(8 + length + begin)
            found[name] = np.frombuffer(opened.read(stop - begin), NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return Table(**found)
