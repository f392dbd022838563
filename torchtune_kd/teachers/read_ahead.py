"""Read in threads, while the device works, what the next batches will ask of a cache.

Shapes: B batch, S sequence, n valid tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchtune_kd.caches.reader import Reading
from torchtune_kd.data.batches import Batch
from torchtune_kd.data.documents import Document, documents_in_batch


class Reader(Protocol):
    """Begin to read what is stored of documents."""

    def read(self, documents: Sequence[Document]) -> Reading:
        """Return their rows, which threads are reading."""
        ...

    def close(self) -> None:
        """Give up what no thread has begun to read."""
        ...


class _Expected(NamedTuple):
    labels: Tensor  # of the batch, by which it is known: they stay on the host
    places: Tensor  # [n] int64 in the flat batch
    reading: Reading


class ReadAhead:
    """Read what batches ask for, in the order in which they were announced.

    Args:
        reader (Reader): of a cache.
        ignore_index (int): label of the tokens that do not count.
        device (torch.device): where columns go.
    """

    def __init__(self, reader: Reader, ignore_index: int, device: torch.device) -> None:
        self._reader, self._ignore_index, self._device = reader, ignore_index, device
        self._expected: list[_Expected] = []

    def expect(self, batch: Batch) -> None:
        """Begin to read what a batch, still on the host, will ask for."""
        rows = documents_in_batch(batch, self._ignore_index)
        length = batch.labels.shape[1]
        places = [
            torch.from_numpy(document.positions + document.start + at * length)
            for at, documents in enumerate(rows)
            for document in documents
        ]
        reading = self._reader.read([document for documents in rows for document in documents])
        places = torch.cat([torch.zeros(0, dtype=torch.long), *places])
        self._expected.append(_Expected(batch.labels, places, reading))

    def take(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the places [n] of a batch's valid tokens in the flat batch, and their columns; none without a token.

        A batch that was not announced is read now; those announced before it, of a step that was given up, are dropped.
        """
        while self._expected and self._expected[0].labels is not batch.labels:
            del self._expected[0]
        if not self._expected:
            self.expect(batch)
        _, places, reading = self._expected.pop(0)
        columns = {name: column.to(self._device, non_blocking=True) for name, column in reading.columns().items()}
        return places.to(self._device, non_blocking=True), columns

    def close(self) -> None:
        """Forget what was announced; nothing is read any more."""
        self._expected.clear()
        self._reader.close()
