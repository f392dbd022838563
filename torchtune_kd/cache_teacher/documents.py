"""All documents of a config's data, alike on every process, and the batches in which the teacher reads them.

Shapes: L tokens of a document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from torchtune_kd.caches.index import Index
from torchtune_kd.caches.shards import marks_of, positions_of
from torchtune_kd.data.batches import check_ids
from torchtune_kd.data.datasets import read_row
from torchtune_kd.data.documents import document_key, documents_in_sample, tokens_of
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError

_MANY_ROWS = 5000  # of a process: so many show a progress bar


@dataclass(frozen=True)
class Listed:
    """A document: where it stands in the data, and what of it is to be stored.

    Attributes:
        key (bytes): of its tokens.
        length (int): L.
        place (tuple[int, int, int]): dataset, row, and where it begins in the row.
        marks (np.ndarray): the positions to be stored, as bits.
    """

    key: bytes
    length: int
    place: tuple[int, int, int]
    marks: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        return positions_of(self.marks)


def list_documents(datasets: Sequence[tuple[str, Dataset]], positions: str, vocab: int, world: World) -> list[Listed]:
    """Return every document of the datasets once, the shortest first, in the same order on every process.

    Each process reads its part of the rows. Of a document that is there several times, with other labels, all labelled
    positions are listed together.

    Args:
        datasets (Sequence[tuple[str, Dataset]]): with their names in the config.
        positions (str): "labels", or "all" tokens of the documents that have a label.
        vocab (int): ids that the teacher has.
        world (World): the processes.

    Raises:
        UserError: for a row that cannot be tokenised, or has an id that the teacher has not.
    """
    ours: dict[bytes, Listed] = {}
    for number, (name, dataset) in enumerate(datasets):
        rows = range(world.rank, len(dataset), world.size)
        hidden = not world.is_rank_zero or len(rows) < _MANY_ROWS
        for row in tqdm(rows, desc=f"Documents of {name}", leave=False, disable=hidden):
            sample = read_row(dataset, row, name)
            check_ids(sample, row, name, vocab)
            for document in documents_in_sample(sample):
                stored = document.positions if positions == "labels" else np.arange(document.length)
                listed = Listed(document.key, document.length, (number, row, document.start), marks_of(stored))
                _add(ours, listed)
    found: dict[bytes, Listed] = {}
    for listed in (listed for of_rank in world.gather(list(ours.values())) for listed in of_rank):
        _add(found, listed)
    return sorted(found.values(), key=lambda listed: (listed.length, listed.key))


def _add(found: dict[bytes, Listed], listed: Listed) -> None:
    """Add a document, or to one that is there its positions; the earliest place counts, whatever the processes."""
    other = found.get(listed.key)
    if other is not None:
        positions = np.union1d(other.positions, listed.positions)
        listed = Listed(listed.key, listed.length, min(listed.place, other.place), marks_of(positions))
    found[listed.key] = listed


def held(listed: Listed, index: Index) -> bool:
    """Return whether all of a document that is to be stored is there."""
    return index.holds(listed.key, listed.positions)


def with_stored(listed: Listed, index: Index) -> Listed:
    """Return a document with the positions that are stored of it, too: of two entries the larger counts."""
    place = index.find(listed.key)
    if place is None:
        return listed
    return replace(listed, marks=marks_of(np.union1d(listed.positions, place.positions)))


def batches_of(documents: Sequence[Listed], tokens_per_batch: int) -> list[list[Listed]]:
    """Group documents of about one length into batches of at most so many tokens, padding counted, or of one document.

    They depend on the documents alone, so that a document is always read in the same batch and gets the same states,
    however often the writer is killed and on however many processes it goes on.
    """
    batches: list[list[Listed]] = []
    for document in documents:
        if not batches or (len(batches[-1]) + 1) * document.length > tokens_per_batch:
            batches.append([])
        batches[-1].append(document)
    return batches


def sample_of(documents: Sequence[Listed], tokens: int) -> Iterator[Listed]:
    """Yield documents as if drawn at random, the same ones always, until so many of their tokens are to be stored."""
    for document in sorted(documents, key=lambda listed: listed.key):
        if tokens <= 0:
            return
        yield document
        tokens -= len(document.positions)


def read_tokens(datasets: Sequence[tuple[str, Any]], document: Listed) -> Tensor:
    """Return the ids [L] of a document.

    Raises:
        UserError: if they are not those that it had when it was listed.
    """
    number, row, start = document.place
    name, dataset = datasets[number]
    tokens = tokens_of(read_row(dataset, row, name), start, document.length)
    if document_key(tokens.numpy()) != document.key:
        raise UserError(
            f"Row {row} of `{name}` gives other tokens each time it is read, and a cache holds fixed ones: distil from "
            "a live teacher, or write the rows to a file first."
        )
    return tokens
