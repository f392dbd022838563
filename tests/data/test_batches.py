"""Labels, packing and the grouping of microbatches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torchtune.datasets import PackedDataset

from torchtune_kd.data.batches import collate_shifted, shift_labels
from torchtune_kd.data.steps import build_loader, microbatches
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError

IGNORE = -100


class Documents(torch.utils.data.Dataset):
    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens = self.documents[index]
        return {"tokens": tokens, "labels": list(tokens)}


def pairs(batch) -> list[tuple[int, int]]:
    """(token, the token it is to predict) of every valid position."""
    valid = batch.labels != IGNORE
    return list(zip(batch.tokens[valid].tolist(), batch.labels[valid].tolist(), strict=True))


DOCUMENTS = [[1, 2, 3], [10, 11], [20], [30, 31, 32, 33]]
PAIRS = [(1, 2), (2, 3), (10, 11), (30, 31), (31, 32), (32, 33)]


def test_padded_rows_predict_the_next_token():
    batch = collate_shifted(
        [Documents(DOCUMENTS)[i] for i in range(4)],
        pad_id=0,
        ignore_index=IGNORE,
        packed=False,
        max_seq_len=8,
    )
    assert pairs(batch) == PAIRS


@pytest.mark.parametrize("max_seq_len", [4, 6, 16])
@pytest.mark.parametrize("ignore_index", [-100, -1])
def test_packs_predict_within_documents_alone(max_seq_len, ignore_index):
    packs = PackedDataset(Documents(DOCUMENTS), max_seq_len=max_seq_len, padding_idx=0)
    batch = collate_shifted(
        [packs[i] for i in range(len(packs))],
        pad_id=0,
        ignore_index=ignore_index,
        packed=True,
        max_seq_len=max_seq_len,
    )
    batch = replace(batch, labels=batch.labels.masked_fill(batch.labels == ignore_index, IGNORE))
    assert pairs(batch) == PAIRS


def test_split_documents_go_on_in_the_next_pack():
    packs = PackedDataset(Documents([[1, 2, 3], [4, 5, 6, 7, 8]]), max_seq_len=4, padding_idx=0, split_across_pack=True)
    batch = collate_shifted(
        [packs[i] for i in range(len(packs))], pad_id=0, ignore_index=IGNORE, packed=True, max_seq_len=4
    )
    assert pairs(batch) == [(1, 2), (2, 3), (5, 6), (6, 7), (7, 8)]  # 3|4 is a border, 4|5 two packs


@pytest.mark.parametrize("ignore_index", [-100, -1])
def test_labels_that_the_dataset_masks_are_ignored(ignore_index):
    samples = [{"tokens": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"tokens": [5], "labels": [5]}]
    batch = collate_shifted(samples, pad_id=0, ignore_index=ignore_index, packed=False, max_seq_len=8)
    assert batch.labels.tolist() == [[ignore_index, 3, 4, ignore_index], [ignore_index] * 4]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(5, 2), (6, 2), (7, 3), (2, 4)])
def test_every_sample_is_seen_once_on_any_number_of_processes(rows, size, shuffle):
    dataset = Documents([[10 * row, 10 * row + 1] for row in range(rows)])
    seen, batches = [], []
    for rank in range(size):
        loader = build_loader(
            dataset,
            SimpleNamespace(pad_id=0),
            batch_size=2,
            shuffle=shuffle,
            ignore_index=IGNORE,
            max_seq_len=8,
            vocab=1000,
            seed=3,
            world=World(torch.device("cpu"), rank, size),
        )
        loader.sampler.set_epoch(1)
        mine = list(loader)
        assert len(mine) == len(loader)
        batches.append(len(mine))
        seen += [pair for batch in mine for pair in pairs(batch)]
    assert sorted(seen) == [(10 * row, 10 * row + 1) for row in range(rows)]
    assert len(set(batches)) == 1


def test_masked_labels_stay_masked():
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4]])
    assert shift_labels(labels, None, IGNORE).tolist() == [[IGNORE, 3, 4, IGNORE]]


def test_a_sample_that_is_too_long_is_an_error():
    with pytest.raises(UserError, match=r"at most 2 tokens.*has 3"):
        collate_shifted([Documents(DOCUMENTS)[0]], pad_id=0, ignore_index=IGNORE, packed=False, max_seq_len=2)


@pytest.mark.parametrize(
    ("per_step", "max_steps", "expected"),
    [
        (1, None, [[0], [1], [2], [3], [4]]),
        (2, None, [[0, 1], [2, 3], [4]]),
        (2, 2, [[0, 1], [2, 3]]),
        (8, None, [[0, 1, 2, 3, 4]]),
        (2, 9, [[0, 1], [2, 3], [4]]),
    ],
)
def test_left_over_microbatches_are_a_shorter_step(per_step, max_steps, expected):
    assert list(microbatches(range(5), per_step, max_steps)) == expected


def test_no_batch_is_drawn_beyond_the_last_step():
    source = iter(range(5))
    list(microbatches(source, 2, 2))
    assert next(source) == 4
