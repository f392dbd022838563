"""Datasets, batches with shifted labels, and the microbatches of one optimizer step.

Shapes: B batch, S sequence.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_packed, padded_collate_sft
from torchtune.datasets import ConcatDataset, PackedDataset
from tqdm import tqdm

from torchtune_kd.training.errors import UserError
from torchtune_kd.training.settings import Settings, build, one_line
from torchtune_kd.training.world import World

Batch = dict[str, Any]


def build_loaders(
    cfg: DictConfig,
    settings: Settings,
    tokenizer: Any,
    ignore_index: int,
    max_seq_len: int,
    vocab: int,
    seed: int,
    world: World,
) -> tuple[StatefulDataLoader, StatefulDataLoader | None]:
    """Training data under ``dataset`` and, where it is given, validation data under ``dataset_val``."""
    common = {"ignore_index": ignore_index, "max_seq_len": max_seq_len, "vocab": vocab, "seed": seed, "world": world}
    dataset = build_dataset(cfg, "dataset", tokenizer, max_seq_len, vocab, world)
    loader = build_loader(dataset, tokenizer, batch_size=settings.batch_size, shuffle=settings.shuffle, **common)
    if cfg.get("dataset_val") is None:
        return loader, None
    dataset = build_dataset(cfg, "dataset_val", tokenizer, max_seq_len, vocab, world)
    batch_size = settings.batch_size_val or settings.batch_size
    return loader, build_loader(dataset, tokenizer, batch_size=batch_size, shuffle=False, name="dataset_val", **common)


def build_dataset(cfg: DictConfig, name: str, tokenizer: Any, max_seq_len: int, vocab: int, world: World) -> Dataset:
    """The dataset under ``cfg.<name>``; a list of sections is concatenated, as in torchtune's recipes.

    Args:
        cfg (DictConfig): the run's config.
        name (str): ``dataset`` or ``dataset_val``.
        tokenizer (Any): torchtune tokenizer that the dataset's rows go through.
        max_seq_len (int): longest sequence that teacher and student take.
        vocab (int): number of ids that both have.
        world (World): rank 0 builds first, so that a download or a cache is made once.

    Raises:
        UserError: for an empty dataset, a sequence longer than ``max_seq_len``, or an id that the models have not.
    """
    with world.rank_zero_first():
        if isinstance(cfg[name], ListConfig):
            parts = [_build_part(part, name, tokenizer) for part in cfg[name]]
            dataset = ConcatDataset(datasets=parts)
        else:
            dataset = _build_part(cfg[name], name, tokenizer)
    if len(dataset) == 0:
        raise UserError(f"Expected at least one sample in `{name}`, but it is empty: check its source and filters.")
    limit = getattr(tokenizer, "max_seq_len", None)
    if limit is None or limit > max_seq_len:
        _check_rows(dataset, name, max_seq_len, vocab, world)
    return dataset


def _build_part(section: DictConfig, name: str, tokenizer: Any) -> Dataset:
    """The dataset of one section. Packing tokenises every row at once; where it fails, the row is looked for."""
    try:
        return build({name: section}, name, tokenizer)
    except Exception:
        if section.get("packed", False):
            rows = build({name: section}, name, tokenizer, packed=False)
            for index in range(len(rows)):
                row(rows, index, name)
        raise


def row(dataset: Dataset, index: int, name: str) -> Batch:
    """Row ``index`` of the dataset under ``name``.

    Raises:
        UserError: naming the row, if it cannot be tokenised.
    """
    try:
        return dataset[index]
    except KeyError as error:
        raise UserError(
            f"Row {index} of `{name}` has nothing under {error}: correct the names of columns in `{name}`, or the row."
        ) from error
    except Exception as error:  # whatever templates, transforms and tokenizers raise
        raise UserError(
            f"Row {index} of `{name}` cannot be tokenised, correct or remove it: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


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
    """Batches of this process: ``tokens`` and ``labels`` [B, S], and ``mask`` and ``input_pos`` of packed data.

    ``labels[b, i]`` is the token that follows ``tokens[b, i]``, or ``ignore_index``: where the dataset masks it, at
    the end of a row, and, in packed data, where the next token belongs to another document. The last batch may be
    smaller; every sample of the dataset is seen once per epoch, and where it does not divide by the processes, the
    batch of a process without a further sample is filled with one that has no valid label.
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
        _CheckedRows(dataset, name, vocab),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
    )


class EachSampleOnce(StatefulDistributedSampler):
    """Deals out each epoch's order like cards, one sample to each process in turn.

    Where torch's distributed sampler would repeat samples to give every process as many, this one yields ``_FILLER``.
    Its state is a position in the order, counted over all processes together: the samples before it were consumed by
    someone. So it can be loaded on another number of processes, and no sample is seen twice or left out.
    """

    position = 0  # where the next iteration begins

    def order(self) -> list[int]:
        """The indices of this epoch (``set_epoch``) in the order in which all processes together consume them."""
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for start in range(self.position, len(order), self.num_replicas):
            mine = start + self.rank
            yield order[mine] if mine < len(order) else _FILLER

    def remaining(self) -> int:
        """How many samples this process has yet to yield in this epoch, the filler included."""
        return max(0, -(-(len(self.dataset) - self.position) // self.num_replicas))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.set_epoch(state_dict["epoch"])
        self.position = state_dict["position"]


class _CheckedRows(Dataset):
    """``dataset`` with its ids checked, and at index ``_FILLER`` a sample without a valid label."""

    def __init__(self, dataset: Dataset, name: str, vocab: int) -> None:
        self._dataset, self._name, self._vocab = dataset, name, vocab

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Batch:
        if index != _FILLER:
            sample = row(self._dataset, index, self._name)
            check_ids(sample, index, self._name, self._vocab)
            return sample
        sample = dict(row(self._dataset, 0, self._name))
        labels = sample["labels"]
        masked = torch.full((len(labels),), CROSS_ENTROPY_IGNORE_IDX)
        sample["labels"] = masked if isinstance(labels, Tensor) else masked.tolist()
        return sample


_FILLER = -1


def is_packed(dataset: Dataset) -> bool:
    return isinstance(dataset, PackedDataset) or bool(getattr(dataset, "packed", False))


def collate_shifted(samples: list[Batch], *, pad_id: int, ignore_index: int, packed: bool, max_seq_len: int) -> Batch:
    """Collate with torchtune's collators, then shift the labels by one: see :func:`build_loader`."""
    longest = max(len(sample["tokens"]) for sample in samples)
    if longest > max_seq_len:
        raise UserError(_too_long("a sample of the dataset", longest, max_seq_len))
    if longest == 0 and not packed:  # a model takes one token at least; it is a microbatch without a valid one
        samples = [{**sample, "tokens": [pad_id], "labels": [CROSS_ENTROPY_IGNORE_IDX]} for sample in samples]
    if packed:
        batch = padded_collate_packed(samples)
    else:
        batch = padded_collate_sft(samples, padding_idx=pad_id, ignore_idx=CROSS_ENTROPY_IGNORE_IDX)
    if ignore_index != CROSS_ENTROPY_IGNORE_IDX:  # torchtune's datasets mask and pad with its own
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == CROSS_ENTROPY_IGNORE_IDX, ignore_index)
    documents = [sample["seq_lens"].tolist() for sample in samples] if packed else None
    batch["labels"] = shift_labels(batch["labels"], documents, ignore_index)
    return batch


def shift_labels(labels: Tensor, documents: list[list[int]] | None, ignore_index: int) -> Tensor:
    """Move labels [B, S] one to the left; ignore the last of a row and of each document.

    Args:
        labels (Tensor): [B, S], each the id of the token at its own place.
        documents (list[list[int]] | None): the lengths of the documents in each packed row.
        ignore_index (int): what stands where there is no next token.
    """
    shifted = torch.full_like(labels, ignore_index)
    shifted[:, :-1] = labels[:, 1:]
    for row, lengths in zip(shifted, documents or [], strict=False):
        ends = torch.tensor(lengths).cumsum(0) - 1
        row[ends] = ignore_index
    return shifted


def microbatches(batches: Iterable[Batch], per_step: int, max_steps: int | None) -> Iterator[list[Batch]]:
    """Group batches into optimizer steps; what is left over at the end is a shorter step."""
    iterator = iter(batches)
    for _ in range(max_steps) if max_steps is not None else itertools.count():
        step = list(itertools.islice(iterator, per_step))
        if not step:
            return
        yield step


def steps_per_epoch(loader: StatefulDataLoader, per_step: int, max_steps: int | None) -> int:
    """Optimizer steps of a whole epoch, at most ``max_steps``."""
    steps = -(-len(loader) // per_step)
    return steps if max_steps is None else min(steps, max_steps)


def steps_left(loader: StatefulDataLoader, per_step: int, max_steps: int | None) -> int:
    """Optimizer steps from the sampler's position to the end of its epoch, at most ``max_steps``."""
    batches = -(-loader.sampler.remaining() // loader.batch_size)
    steps = -(-batches // per_step)
    return steps if max_steps is None else min(steps, max(max_steps, 0))


def attention_inputs(batch: Batch, move: Callable[[Any], Any]) -> dict[str, Any]:
    """``mask`` and ``input_pos`` where the batch has them, on the device."""
    return {name: move(batch[name]) for name in ("mask", "input_pos") if batch.get(name) is not None}


def check_ids(sample: Batch, index: int, name: str, vocab: int) -> None:
    """Refuse row ``index`` of ``name`` if one of its ``tokens`` is none of the ``vocab`` ids of the models."""
    tokens = torch.as_tensor(sample["tokens"])
    if tokens.numel() and not 0 <= (wrong := int(tokens.max() if tokens.min() >= 0 else tokens.min())) < vocab:
        raise UserError(
            f"Expected ids from 0 to {vocab - 1}, which teacher and student share, but row {index} of `{name}` holds "
            f"{wrong}: name the tokenizer of these models, or remove what gives that id (an image, for example)."
        )


def _check_rows(dataset: Dataset, name: str, max_seq_len: int, vocab: int, world: World) -> None:
    """Check length and ids of every row, each process its part; of packs the first, since they are all as long."""
    rows = range(1) if isinstance(dataset, PackedDataset) else range(world.rank, len(dataset), world.size)
    for index in tqdm(rows, desc=f"Lengths of {name}", leave=False, disable=not world.is_rank_zero or len(rows) < 5000):
        sample = row(dataset, index, name)
        check_ids(sample, index, name, vocab)
        if len(sample["tokens"]) > max_seq_len:
            raise UserError(_too_long(f"sample {index} of `{name}`", len(sample["tokens"]), max_seq_len))


def _too_long(what: str, length: int, max_seq_len: int) -> str:
    return (
        f"Expected sequences of at most {max_seq_len} tokens, the most that teacher and student take, but {what} has "
        f"{length}: set `tokenizer.max_seq_len: {max_seq_len}` (it also bounds packed rows)."
    )
