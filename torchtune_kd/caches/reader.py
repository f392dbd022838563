"""Documents out of a cache: in threads, ahead of the step that needs them.

Shapes: n tokens, V vocabulary, D hidden width of the teacher.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from torchtune_kd.caches.index import Index, Place
from torchtune_kd.caches.layout import HEAD, SHARDS, CacheManifest
from torchtune_kd.caches.log_probs import NONE
from torchtune_kd.caches.shards import TABLE, Column, as_bytes, checksum, read_header
from torchtune_kd.data.documents import Document
from torchtune_kd.errors import RunError, UserError, first_line
from torchtune_kd.storage.manifest import Damaged, check_content

THREADS = 4


class Reading:
    """Rows that threads are reading; :meth:`columns` waits for them."""

    def __init__(self, columns: dict[str, Tensor], parts: Sequence[Future[None]]) -> None:
        self._columns, self._parts = columns, parts

    def columns(self) -> dict[str, Tensor]:
        """Return each column [n, ...] on the host.

        Raises:
            RunError: if a document cannot be read, or is not what was written.
        """
        for part in self._parts:
            part.result()
        return self._columns


class CacheReader:
    """Read documents of a finished cache.

    Args:
        folder (Path): the cache's.
        pinned (bool): read into page-locked memory, which a CUDA device copies from without waiting.

    Attributes:
        folder (Path): the cache's.
        manifest (CacheManifest): what it says of itself.
        index (Index): where its documents lie.

    Raises:
        UserError: for a folder that is no finished cache, or lacks a file.
    """

    def __init__(self, folder: Path, *, pinned: bool = False) -> None:
        self.folder, self._pinned = folder, pinned
        self.manifest = CacheManifest.read(folder)
        self._check(self.manifest.index)
        self.index = Index.read(folder / self.manifest.index)
        self._shards = self.manifest.shards
        self._columns: dict[int, dict[str, Column]] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cache")

    def head(self) -> dict[str, Tensor]:
        """Return ``weight`` [V, D], ``channel_rms`` [D] and, where the teacher's head has one, ``bias`` [V].

        Raises:
            UserError: if the file cannot be read, or is not what was written.
        """
        self._check(HEAD)
        return load_file(self.folder / HEAD)

    def close(self) -> None:
        """Give up what no thread has begun to read; a process that ends waits for the rest."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check(self, name: str) -> None:
        """Read one of the files whole, and compare it with the manifest; shards are checked document by document."""
        try:
            check_content(self.folder, name, self.manifest.files[name])
        except Damaged as error:
            raise UserError(f"The cache in {self.folder} is damaged, {error}: {self.manifest.remedy}.") from error
        except OSError as error:
            raise UserError(
                f"The file {self.folder / name} cannot be read ({error.strerror}): see that its disk is there, and "
                f"that this user may read it, or {self.manifest.remedy}."
            ) from error

    def read(self, documents: Sequence[Document]) -> Reading:
        """Begin to read the labelled tokens of documents, in their order.

        Raises:
            RunError: for a document that is not in the cache, or lacks one of its positions, and for a shard that
                cannot be read any more.
        """
        places = [self._place(document) for document in documents]
        total = sum(len(document.positions) for document in documents)
        columns = {
            name: torch.empty(total, *column.shape, dtype=column.dtype, pin_memory=self._pinned)
            for name, column in self._widest(places, documents).items()
        }
        parts, begin = [], 0
        for document, place in zip(documents, places, strict=True):
            end = begin + len(document.positions)
            into = {name: column[begin:end] for name, column in columns.items()}
            parts.append(self._pool.submit(self._read_one, place, document, into))
            begin = end
        return Reading(columns, parts)

    def _place(self, document: Document) -> Place:
        place = self.index.find(document.key)
        if place is None or not self.index.holds(document.key, document.positions):
            raise RunError(
                f"A document of {document.length} tokens is not in the cache {self.folder}, or not all of its labelled "
                "tokens are: its dataset gives other tokens each time it is read, so distil from a live teacher."
            )
        return place

    def _columns_of(self, place: Place, document: Document) -> dict[str, Column]:
        """Return where the columns of a document's shard lie; a shard is checked when its first document is read."""
        shard = place.shard
        if shard not in self._columns:
            try:
                columns, _ = read_header(self.folder / SHARDS / self._shards[shard])
                found = {name: column for name, column in columns.items() if name not in TABLE}
                _check_columns(self._shards[shard], found, self.manifest)
            except Damaged as error:
                raise self._unreadable(place, document, str(error)) from error
            self._columns[shard] = found
        return self._columns[shard]

    def _unreadable(self, place: Place, document: Document, why: str) -> RunError:
        return RunError(
            f"The document {document.key.hex()} in {self.folder / SHARDS / self._shards[place.shard]} cannot be read, "
            f"{why}: see that its disk is there, or {self.manifest.remedy}."
        )

    def _widest(self, places: Sequence[Place], documents: Sequence[Document]) -> dict[str, Column]:
        """Return the columns into which the rows of all documents go: of drawn ids each shard has its own width."""
        widest: dict[str, Column] = {}
        for place, document in zip(places, documents, strict=True):
            for name, column in self._columns_of(place, document).items():
                if name not in widest or column.shape > widest[name].shape:
                    widest[name] = column
        return widest

    def _read_one(self, place: Place, document: Document, into: dict[str, Tensor]) -> None:
        """Read all rows of a document, check them, and keep those that are asked for."""
        columns = self._columns_of(place, document)
        file = self.folder / SHARDS / self._shards[place.shard]
        whole = len(place.positions) == len(document.positions)  # then they are the same ones
        whole = whole and all(into[name].shape[1:] == column.shape for name, column in columns.items())
        rows = (
            into
            if whole
            else {name: torch.empty(place.count, *column.shape, dtype=column.dtype) for name, column in columns.items()}
        )
        try:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                for name, column in columns.items():
                    memory = as_bytes(rows[name])
                    _read_whole(descriptor, memory, column.offset + place.start * column.row_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unreadable(place, document, error.strerror or first_line(error)) from error
        if checksum({name: as_bytes(tensor) for name, tensor in rows.items()}) != place.crc32:
            raise RunError(
                f"The document {document.key.hex()} in {file} is not what was written, its checksum differs: "
                f"{self.manifest.remedy}."
            )
        if not whole:
            kept = torch.from_numpy(np.searchsorted(place.positions, document.positions))
            for name, tensor in rows.items():
                if tensor.dim() == 2:
                    into[name].fill_(NONE if name == "ids" else 0)[:, : tensor.shape[1]] = tensor[kept]
                else:
                    into[name].copy_(tensor[kept])


def _check_columns(shard: str, found: Mapping[str, Column], manifest: CacheManifest) -> None:
    """Refuse columns that are not those of the manifest's kind: checksums are of the rows, not of a shard's header.

    Raises:
        Damaged: naming the shard.
    """
    expected = manifest.columns
    good = found.keys() == expected.keys()
    for name, column in found.items() if good else ():
        dtype, width = expected[name]
        good &= column.dtype == dtype and len(column.shape) == (0 if width is None else 1)
        good &= manifest.kind != "hidden" or column.shape in ((), (width,))
    if not good:
        raise Damaged(f"the file {shard} does not hold {manifest.stored}")


def _read_whole(descriptor: int, memory: memoryview, offset: int) -> None:
    """Fill ``memory`` from the file."""
    done = 0
    while done < len(memory):
        read = os.preadv(descriptor, [memory[done:]], offset + done)
        if read == 0:
            raise OSError(f"it ends {len(memory) - done} bytes too early")
        done += read
