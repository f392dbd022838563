"""Documents, known by their tokens: what a teacher says about one depends on nothing else.

A document is a row of a dataset, or one of the documents that a packed row holds. Attention is causal and does not
cross from one document into another, and positions begin anew in each, so that its hidden states are the same in any
order, batch and packing, on any number of processes, and in any subset of the data.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_kd.data.batches import Batch, Sample, document_lengths, shift_labels

KEY_BYTES = 16


class Document(NamedTuple):
    """A document of a row, and which of its tokens have a label.

    Attributes:
        key (bytes): BLAKE2b of its ids as little-endian int32, :data:`KEY_BYTES` long.
        start (int): where it begins in the row.
        length (int): its tokens.
        positions (np.ndarray): [n] int64, tokens with a valid label, counted from ``start``, in order.
    """

    key: bytes
    start: int
    length: int
    positions: np.ndarray


def document_key(tokens: np.ndarray) -> bytes:
    """Return the key of a document of these ids [L]."""
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=KEY_BYTES).digest()


def documents_in_batch(batch: Batch, ignore_index: int) -> list[list[Document]]:
    """Return the documents with a valid label in each row of a batch whose tokens can be read by the host."""
    tokens, valid = batch.tokens.cpu().numpy(), (batch.labels != ignore_index).numpy()
    rows = zip(tokens, valid, batch.lengths, strict=True)
    return [list(_documents(ids, marks, lengths)) for ids, marks, lengths in rows]


def documents_in_sample(sample: Sample) -> list[Document]:
    """Return the documents with a valid label in a row of a dataset, as a batch would hold them."""
    lengths = [length for length in document_lengths(sample) if length]
    if not lengths:  # a row may be empty
        return []
    tokens, labels = torch.as_tensor(sample["tokens"]), torch.as_tensor(sample["labels"])
    shifted = shift_labels(labels.unsqueeze(0), [lengths], CROSS_ENTROPY_IGNORE_IDX)[0]
    return list(_documents(tokens.numpy(), (shifted != CROSS_ENTROPY_IGNORE_IDX).numpy(), lengths))


def _documents(tokens: np.ndarray, valid: np.ndarray, lengths: Sequence[int]) -> Iterator[Document]:
    start = 0
    for length in lengths:
        positions = np.flatnonzero(valid[start : start + length])
        if len(positions):
            yield Document(document_key(tokens[start : start + length]), start, length, positions)
        start += length


def tokens_of(sample: Sample, start: int, length: int) -> Tensor:
    """Return the ids [L] of the document that begins at ``start`` of a dataset's row."""
    return torch.as_tensor(sample["tokens"])[start : start + length]
