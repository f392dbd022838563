"""Datasets and their rows, checked before the first step."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from torchtune.datasets import ConcatDataset, PackedDataset
from tqdm import tqdm

from torchtune_kd.config.sections import Section
from torchtune_kd.data.batches import Sample, check_ids, too_long_sentence
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, one_line


def build_dataset(
    sections: Sequence[Section], name: str, tokenizer: Any, max_seq_len: int, vocab: int, world: World
) -> Dataset:
    """Build the dataset of one section, or concatenate those of several, as in torchtune's recipes.

    Args:
        sections (Sequence[Section]): of one dataset each.
        name (str): ``dataset`` or ``dataset_val``.
        tokenizer (Any): torchtune tokenizer that the dataset's rows go through.
        max_seq_len (int): longest sequence that teacher and student take.
        vocab (int): number of ids that both have.
        world (World): rank 0 builds first, so that a download or a cache is made once.

    Raises:
        UserError: for an empty dataset, a sequence longer than ``max_seq_len``, or an id that the models have not.
    """
    with world.rank_zero_first():
        parts = [_build_part(section, tokenizer) for section in sections]
        dataset = parts[0] if len(parts) == 1 else Parts(parts)
    if len(dataset) == 0:
        raise UserError(f"Expected at least one sample in `{name}`, but it is empty: check its source and filters.")
    limit = getattr(tokenizer, "max_seq_len", None)
    if limit is None or limit > max_seq_len:
        _check_rows(dataset, name, max_seq_len, vocab, world)
    return dataset


class Parts(ConcatDataset):
    """Several datasets, one after the other.

    Args:
        datasets (Sequence[Dataset]): all packed, or none.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        super().__init__(datasets=list(datasets))
        self._ends = list(itertools.accumulate(len(dataset) for dataset in datasets))

    def part_of(self, index: int) -> int:
        """Return the position of the dataset that row ``index`` is of."""
        return bisect.bisect_right(self._ends, index)


def _build_part(section: Section, tokenizer: Any) -> Dataset:
    """Build the dataset of one section. Packing tokenises every row at once; where it fails, the row is looked for."""
    try:
        return section.build(tokenizer)
    except Exception:
        if section.get("packed", False):
            rows = section.build(tokenizer, packed=False)
            for index in range(len(rows)):
                read_row(rows, index, section.path)
        raise


def read_row(dataset: Dataset, index: int, name: str) -> Sample:
    """Read row ``index`` of the dataset under ``name``.

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


def is_packed(dataset: Dataset) -> bool:
    return isinstance(dataset, PackedDataset) or bool(getattr(dataset, "packed", False))


def _check_rows(dataset: Dataset, name: str, max_seq_len: int, vocab: int, world: World) -> None:
    """Check length and ids of every row, each process its part; of packs the first, since they are all as long."""
    rows = range(1) if isinstance(dataset, PackedDataset) else range(world.rank, len(dataset), world.size)
    for index in tqdm(rows, desc=f"Lengths of {name}", leave=False, disable=not world.is_rank_zero or len(rows) < 5000):
        sample = read_row(dataset, index, name)
        check_ids(sample, index, name, vocab)
        if len(sample["tokens"]) > max_seq_len:
            raise UserError(too_long_sentence(f"sample {index} of `{name}`", len(sample["tokens"]), max_seq_len))
