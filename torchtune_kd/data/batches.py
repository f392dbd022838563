"""Batches with shifted labels.

Shapes: B batch, S sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_packed, padded_collate_sft

from torchtune_kd.errors import UserError

Sample = dict[str, Any]  # a row of a dataset: tokens and labels, and seq_lens where it is packed


@dataclass(frozen=True)
class Batch:
    """The sequences of one microbatch.

    Attributes:
        tokens (Tensor): [B, S] ids.
        labels (Tensor): [B, S], the id that follows each token, or ``ignore_index``. They stay on the host: finding
            the valid ones there waits for no device.
        mask (Any): which tokens of packed data see each other, as torchtune's decoders take it; None elsewhere.
        input_pos (Tensor | None): [B, S] positions of packed data.
        lengths (Sequence[Sequence[int]]): of the documents in each row, from its beginning; the rest is padding.
        parts (Sequence[int]): of each row, the position of its dataset in the config; empty where there is one.
    """

    tokens: Tensor
    labels: Tensor
    mask: Any = None
    input_pos: Tensor | None = None
    lengths: Sequence[Sequence[int]] = ()
    parts: Sequence[int] = ()

    @property
    def attention(self) -> dict[str, Any]:
        """Return the keyword arguments of a decoder that go with the tokens."""
        both = {"mask": self.mask, "input_pos": self.input_pos}
        return {name: value for name, value in both.items() if value is not None}

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with all but its labels on ``device``; nobody waits for the copies."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)
            for name, value in {"tokens": self.tokens, **self.attention}.items()
        }
        return replace(self, **moved)

    def rows(self, index: Sequence[int], ignore_index: int) -> "Batch":
        """Return some of the rows; without any, the first one with no label that counts, so that a model can run.

        Args:
            index (Sequence[int]): which.
            ignore_index (int): label of the tokens that do not count.

        Raises:
            UserError: for a mask that cannot be taken apart.
        """
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise UserError(
                "Teachers with `datasets` need rows that are not packed, since the mask of flex attention cannot be "
                "taken apart: set `packed: False` under `dataset`."
            )
        at = list(index) or [0]
        moved = {name: value[at] for name, value in {"tokens": self.tokens, **self.attention}.items()}
        labels = self.labels[at] if index else torch.full_like(self.labels[at], ignore_index)
        return Batch(labels=labels, lengths=[self.lengths[row] for row in at], **moved)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, as PyTorch's loader asks for it."""
        pinned = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **pinned)


def collate_shifted(samples: list[Sample], *, pad_id: int, ignore_index: int, packed: bool, max_seq_len: int) -> Batch:
    """Collate with torchtune's collators, then shift the labels by one: see :func:`build_loader`."""
    longest = max(len(sample["tokens"]) for sample in samples)
    if longest > max_seq_len:
        raise UserError(too_long_sentence("a sample of the dataset", longest, max_seq_len))
    if longest == 0 and not packed:  # a model takes one token at least; it is a microbatch without a valid one
        samples = [{**sample, "tokens": [pad_id], "labels": [CROSS_ENTROPY_IGNORE_IDX]} for sample in samples]
    if packed:
        batch = padded_collate_packed(samples)
    else:
        batch = padded_collate_sft(samples, padding_idx=pad_id, ignore_idx=CROSS_ENTROPY_IGNORE_IDX)
    if ignore_index != CROSS_ENTROPY_IGNORE_IDX:  # torchtune's datasets mask and pad with its own
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == CROSS_ENTROPY_IGNORE_IDX, ignore_index)
    lengths = [document_lengths(sample) for sample in samples]
    labels = shift_labels(batch["labels"], lengths if packed else None, ignore_index)
    parts = [sample["part"] for sample in samples if "part" in sample]
    return Batch(batch["tokens"], labels, batch.get("mask"), batch.get("input_pos"), lengths, parts)


def document_lengths(sample: Sample) -> list[int]:
    """Return how long the documents of a dataset's row are: several where it is packed."""
    return [int(length) for length in sample["seq_lens"]] if "seq_lens" in sample else [len(sample["tokens"])]


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


def check_ids(sample: Sample, index: int, name: str, vocab: int) -> None:
    """Refuse row ``index`` of ``name`` if one of its ``tokens`` is none of the ``vocab`` ids of the models."""
    tokens = torch.as_tensor(sample["tokens"])
    if tokens.numel() and not 0 <= (wrong := int(tokens.max() if tokens.min() >= 0 else tokens.min())) < vocab:
        raise UserError(
            f"Expected ids from 0 to {vocab - 1}, which teacher and student share, but row {index} of `{name}` holds "
            f"{wrong}: name the tokenizer of these models, or remove what gives that id (an image, for example)."
        )


def too_long_sentence(what: str, length: int, max_seq_len: int) -> str:
    return (
        f"Expected sequences of at most {max_seq_len} tokens, the most that teacher and student take, but {what} has "
        f"{length}: set `tokenizer.max_seq_len: {max_seq_len}` (it also bounds packed rows)."
    )
