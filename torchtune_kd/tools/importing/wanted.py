"""The documents of a config's data: what is looked for in a source, and how much of it was found."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from torchtune_kd.caches.shards import marks_of, positions_of
from torchtune_kd.data.datasets import read_row
from torchtune_kd.data.documents import document_key, documents_in_sample, tokens_of
from torchtune_kd.tools.importing.told import Told

_MANY_ROWS = 5000  # so many show a progress bar
_SHOWN = 8  # ids of a document in a sentence


class Found(NamedTuple):
    """A document of a source that the config's data hold.

    Attributes:
        key (bytes): of its tokens.
        rows (np.ndarray): which of the source's positions have a label.
        positions (np.ndarray): these positions.
        labels (np.ndarray): ids that follow them; -1 at the end of the document.
    """

    key: bytes
    rows: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


class Coverage(NamedTuple):
    """Count the rows of a dataset that were found."""

    name: str
    rows: int
    absent: int  # a document of the row is not there
    incomplete: int  # it is, but not with all of its labelled tokens

    @property
    def found(self) -> int:
        return self.rows - self.absent - self.incomplete


class Wanted:
    """Know the documents of datasets, and which of their tokens have a label.

    Args:
        datasets (Sequence[tuple[str, Dataset]]): with their names in the config.

    Attributes:
        first (list[int]): how the first document begins.
    """

    def __init__(self, datasets: Sequence[tuple[str, Dataset]]) -> None:
        self._marks: dict[bytes, np.ndarray] = {}
        self._stored: dict[bytes, np.ndarray] = {}
        self._rows: dict[str, list[list[tuple[bytes, np.ndarray]]]] = {}
        self.first: list[int] = []
        for name, dataset in datasets:
            rows: list[list[tuple[bytes, np.ndarray]]] = []
            hidden = len(dataset) < _MANY_ROWS
            for index in tqdm(range(len(dataset)), desc=f"Documents of {name}", leave=False, disable=hidden):
                sample = read_row(dataset, index, name)
                rows.append([])
                for document in documents_in_sample(sample):
                    if not self.first:
                        self.first = tokens_of(sample, document.start, min(document.length, _SHOWN)).tolist()
                    before = self._marks.get(document.key)
                    both = document.positions
                    if before is not None:
                        both = np.union1d(positions_of(before), both)
                    self._marks[document.key] = marks_of(both)
                    rows[-1].append((document.key, marks_of(document.positions)))
            self._rows[name] = rows

    def find(self, told: Told) -> Found | None:
        """Return the document that a source means; None if no dataset has it, or it was there with as much before."""
        for tokens in told.documents:
            key = document_key(tokens)
            if key not in self._marks:
                continue
            rows = np.flatnonzero(np.isin(told.positions, positions_of(self._marks[key])))
            positions = told.positions[rows]
            if not len(rows) or len(self._stored.get(key, ())) >= len(rows):
                return None
            self._stored[key] = positions
            return Found(key, rows, positions, np.append(tokens, -1)[positions + 1])
        return None

    def coverage(self) -> list[Coverage]:
        """Return how many rows of each dataset were found until now; rows without a label need nothing."""
        found = []
        for name, rows in self._rows.items():
            absent = incomplete = 0
            for documents in rows:
                stored = [self._stored.get(key) for key, _ in documents]
                if any(positions is None for positions in stored):
                    absent += 1
                elif not all(
                    np.isin(positions_of(marks), positions).all()
                    for (_, marks), positions in zip(documents, stored, strict=True)
                ):
                    incomplete += 1
            found.append(Coverage(name, len(rows), absent, incomplete))
        return found
