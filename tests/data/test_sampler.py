"""The data position counts over all processes: on any other number of them nothing is seen twice or left out."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from torchtune_kd.data.steps import build_loader, microbatches, steps_left
from torchtune_kd.distributed.world import World

IGNORE = -100


class Rows(Dataset):
    """Row i is the tokens (10 i, 10 i + 1)."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"tokens": [10 * index, 10 * index + 1], "labels": [10 * index, 10 * index + 1]}


def loaders(count, size, batch_size, shuffle, position):
    for rank in range(size):
        loader = build_loader(
            Rows(count),
            SimpleNamespace(pad_id=0),
            batch_size=batch_size,
            shuffle=shuffle,
            ignore_index=IGNORE,
            max_seq_len=8,
            vocab=1000,
            seed=3,
            world=World(torch.device("cpu"), rank, size),
        )
        loader.sampler.load_state_dict({"epoch": 1, "position": position})
        yield loader


def seen(batches):
    """Rows with a valid label; the filler has none."""
    return [int(row[0]) // 10 for batch in batches for row, labels in zip(batch.tokens, batch.labels, strict=True)
            if (labels != IGNORE).any()]  # fmt: skip


@pytest.mark.parametrize("case", range(40))
def test_every_sample_once_over_any_changes_of_processes_and_batches(case):
    draw = random.Random(case)
    count, shuffle = draw.randint(1, 60), draw.random() < 0.8
    position, rows = 0, []
    while position < count:
        size, batch_size, per_step = draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 3)
        stop_after = draw.randint(1, 6)
        parts, all_left = [], set()
        for loader in loaders(count, size, batch_size, shuffle, position):
            left = steps_left(loader, per_step, None)
            all_left.add(left)
            steps = list(microbatches(loader, per_step, None))
            assert len(steps) == left
            parts.append(steps[:stop_after])
        assert len(all_left) == 1  # all processes take as many steps
        rows += [row for steps in parts for step in steps for row in seen(step)]
        taken = sum(len(batch.tokens) for step in parts[0] for batch in step)
        position = min(position + size * taken, count)
    assert sorted(rows) == list(range(count))


def test_the_state_is_read_from_the_sampler(tmp_path):
    (loader,) = loaders(10, 1, 2, True, 4)
    assert loader.sampler.state_dict() == {"epoch": 1, "position": 4}
    assert seen(loader) == loader.sampler.order()[4:]


def test_beyond_the_end_no_step_is_left():
    """Where a run goes on although its dataset became shorter, or its epochs did."""
    (loader,) = loaders(10, 1, 2, shuffle=True, position=14)
    assert steps_left(loader, 2, None) == 0
    assert not list(microbatches(loader, 2, steps_left(loader, 2, None)))
    (loader,) = loaders(10, 1, 2, shuffle=True, position=2)
    assert steps_left(loader, 2, max_steps=-1) == 0
