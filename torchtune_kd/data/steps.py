"""Loaders, and the microbatches of one optimizer step.

Shapes: B batch, S sequence.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from torchtune_kd.config.reading import Config
from torchtune_kd.data.batches import Batch, collate_shifted
from torchtune_kd.data.datasets import build_dataset, is_packed
from torchtune_kd.data.sampler import CheckedRows, EachSampleOnce
from torchtune_kd.distributed.world import World


def build_loaders(
    config: Config,
    tokenizer: Any,
    ignore_index: int,
    max_seq_len: int,
    vocab: int,
    seed: int,
    world: World,
) -> tuple[StatefulDataLoader, StatefulDataLoader | None]:
    """Build training data and, where there is any, validation data."""
    settings = config.settings
    common = {"ignore_index": ignore_index, "max_seq_len": max_seq_len, "vocab": vocab, "seed": seed, "world": world}
    dataset = build_dataset(config.dataset, "dataset", tokenizer, max_seq_len, vocab, world)
    loader = build_loader(dataset, tokenizer, batch_size=settings.batch_size, shuffle=settings.shuffle, **common)
    if not config.dataset_val:
        return loader, None
    dataset = build_dataset(config.dataset_val, "dataset_val", tokenizer, max_seq_len, vocab, world)
    batch_size = settings.batch_size_val or settings.batch_size
    return loader, build_loader(dataset, tokenizer, batch_size=batch_size, shuffle=False, name="dataset_val", **common)


def build_loader(
    dataset: Dataset,
    tokenizer: Any,
    *,
    batch_size: int,
    shuffle: bool,
    ignore_index: int,
    max_seq_len: int,
    vocab: int,
    seed: int,
    world: World,
    name: str = "dataset",
) -> StatefulDataLoader:
    """Build the loader of this process's batches.

    ``labels[b, i]`` of a :class:`~torchtune_kd.data.batches.Batch` is the token that follows ``tokens[b, i]``, or
    ``ignore_index``: where the dataset masks it, at the end of a row, and, in packed data, where the next token belongs
    to another document. The last batch may be smaller; every sample of the dataset is seen once per epoch, and where it
    does not divide by the processes, the batch of a process without a further sample is filled with one that has no
    valid label.
    """
    collate = functools.partial(
        collate_shifted,
        pad_id=tokenizer.pad_id,
        ignore_index=ignore_index,
        packed=is_packed(dataset),
        max_seq_len=max_seq_len,
    )
    sampler = EachSampleOnce(dataset, num_replicas=world.size, rank=world.rank, shuffle=shuffle, seed=seed)
    return StatefulDataLoader(
        CheckedRows(dataset, name, vocab),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
    )


def microbatches(batches: Iterable[Batch], per_step: int, max_steps: int | None) -> Iterator[list[Batch]]:
    """Group batches into optimizer steps; what is left over at the end is a shorter step."""
    iterator = iter(batches)
    for _ in range(max_steps) if max_steps is not None else itertools.count():
        step = list(itertools.islice(iterator, per_step))
        if not step:
            return
        yield step


def steps_per_epoch(loader: StatefulDataLoader, per_step: int, max_steps: int | None) -> int:
    """Count the optimizer steps of a whole epoch, at most ``max_steps``."""
    steps = -(-len(loader) // per_step)
    return steps if max_steps is None else min(steps, max_steps)


def steps_left(loader: StatefulDataLoader, per_step: int, max_steps: int | None) -> int:
    """Count the optimizer steps from the sampler's position to the end of its epoch, at most ``max_steps``."""
    batches = -(-loader.sampler.remaining() // loader.batch_size)
    steps = -(-batches // per_step)
    return steps if max_steps is None else min(steps, max(max_steps, 0))
