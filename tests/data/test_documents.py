"""Documents are known by their tokens, in whatever row, batch and packing they stand."""

import hashlib

import numpy as np
import torch

from torchtune_kd.data.batches import collate_shifted
from torchtune_kd.data.documents import document_key, documents_in_batch, documents_in_sample, tokens_of

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
MASKED = [2, 0, 3]  # tokens at the beginning without a label; of the last none has one


def sample(tokens, masked):
    return {"tokens": tokens, "labels": [-100] * masked + tokens[masked:]}


def packed():
    tokens = torch.tensor([token for row in ROWS for token in row] + [0] * 3)
    labels = torch.tensor(
        [id for row, n in zip(ROWS, MASKED, strict=True) for id in sample(row, n)["labels"]] + [-100] * 3
    )
    positions = torch.tensor([i for row in ROWS for i in range(len(row))] + [0, 1, 2])
    return {"tokens": tokens, "labels": labels, "input_pos": positions, "seq_lens": torch.tensor([4, 2, 3, 3])}


def test_a_key_is_the_hash_of_the_ids():
    ids = np.array([1, 2, 300])
    expected = hashlib.blake2b(b"\1\0\0\0\2\0\0\0\x2c\1\0\0", digest_size=16).digest()
    assert document_key(ids) == document_key(ids.astype(np.int32)) == expected != document_key(ids[:2])


def test_packed_or_a_row_each_they_are_the_same_documents():
    apart = [documents_in_sample(sample(row, masked)) for row, masked in zip(ROWS, MASKED, strict=True)]
    together = documents_in_sample(packed())
    assert [document.key for documents in apart for document in documents] == [document.key for document in together]
    # a token is stored where the next one has a label
    assert [document.positions.tolist() for document in together] == [[1, 2], [0]]
    assert [(document.start, document.length) for document in together] == [(0, 4), (4, 2)]
    assert tokens_of(packed(), 4, 2).tolist() == ROWS[1]


def test_in_a_batch_they_are_those_of_its_rows():
    rows = [sample(row, masked) for row, masked in zip(ROWS, MASKED, strict=True)]
    padded = collate_shifted(rows, pad_id=0, ignore_index=-1, packed=False, max_seq_len=8)
    found = documents_in_batch(padded, -1)
    assert [[document.key for document in row] for row in found] == [
        [document.key for document in documents_in_sample(row)] for row in rows
    ]
    packs = collate_shifted([packed()], pad_id=0, ignore_index=-100, packed=True, max_seq_len=12)
    (row,) = documents_in_batch(packs, -100)
    assert [document.key for document in row] == [document.key for document in documents_in_sample(packed())]
    for document, labels in ((each, packs.labels[0]) for each in row):
        assert (labels[document.positions + document.start] != -100).all()
    assert sum(len(document.positions) for document in row) == int((packs.labels != -100).sum())
