"""Parquet files of arcee-ai/DistillKit, three kinds of columns: see :mod:`.distillkit_coding`, or plain ids and values.

A row holds ``input_ids`` [L] and a signal for each of the first L - 1 tokens, or for all L where it was packed by
DistillKit; then ``attention_mask`` numbers its documents from 1. DistillKit's writer puts one padding token behind a
text that is shorter than its limit, so that the document is the row with or without its last token.

Shapes: L tokens of a row, R tokens with a signal, k ids of each.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from torchtune_kd.errors import UserError
from torchtune_kd.tools.importing.distillkit_coding import Compressed, Legacy, read_compression
from torchtune_kd.tools.importing.rows import PARQUET, parquet_batches, source_files
from torchtune_kd.tools.importing.told import Likeliest, Told

COMPRESSION = "compression_config.yaml"
_PLAIN = ("token_ids", "top_values")


def read_distillkit(source: Path, compression: Path | None = None, *, exact_only: bool = False) -> Iterator[Told]:
    """Yield what each document's tokens are followed by.

    Args:
        source (Path): a Parquet file, or a folder of them.
        compression (Path | None): the compression config; None for ``compression_config.yaml`` beside the files.
        exact_only (bool): leave out the ids whose log-probabilities were fitted, so that their mass counts to the rest.

    Raises:
        UserError: for columns that are not there, and what does not fit together.
    """
    for file in source_files(source, PARQUET):
        names = _column_names(file)
        columns, coding = _coding(file, names, source, compression)
        if exact_only and coding is not None and not coding.exact_k:
            raise UserError(f"Expected exact log-probabilities in {file}, but all are fitted: leave --exact-only out.")
        read = [name for name in ("input_ids", "attention_mask", *columns) if name in names]
        number = 0
        for batch in parquet_batches(file, read):
            yield from _told(batch, columns, coding, file, number, exact_only=exact_only)
            number += len(batch)


def _column_names(file: Path) -> list[str]:
    try:
        return pyarrow.parquet.read_schema(file).names
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"Expected a Parquet file, but {file} cannot be read as one: fetch it again.") from error


def _coding(
    file: Path, names: Sequence[str], source: Path, compression: Path | None
) -> tuple[Sequence[str], Compressed | Legacy | None]:
    """Return the columns of a file's signal, and how they are coded; None for plain ids and values."""
    for columns in (Compressed.columns, Legacy.columns, _PLAIN):
        if "input_ids" in names and set(columns) <= set(names):
            break
    else:
        kinds = "; or ".join(", ".join(columns) for columns in (Compressed.columns, Legacy.columns, _PLAIN))
        raise UserError(
            f"Expected the column input_ids beside {kinds}, but {file} has {', '.join(names)}: name a source that "
            "DistillKit wrote."
        )
    if columns is _PLAIN:
        return columns, None
    beside = [folder / COMPRESSION for folder in (file.parent, source)]
    found = compression or next((path for path in beside if path.is_file()), None)
    if found is None:
        raise UserError(
            f"Expected {COMPRESSION} beside {file}, but there is none: name it, or the DistillKit config that has the "
            "compression's keys, under --compression."
        )
    coding = read_compression(found)
    if coding.columns != columns:
        raise UserError(
            f"Expected the compression of {', '.join(columns)}, which {file} has, but {found} is of "
            f"{', '.join(coding.columns)}: name the config that the source was written with under --compression."
        )
    return columns, coding


def _told(
    batch: pyarrow.RecordBatch, columns: Sequence[str], coding: Any, file: Path, number: int, *, exact_only: bool
) -> Iterator[Told]:
    """Decode the rows of a batch together, and yield their documents."""
    where = f"rows {number} to {number + len(batch) - 1} of {file}"
    tokens, token_ends = _flat(batch.column("input_ids"), "input_ids", where)
    matrices = [_matrix(batch.column(name), name, where) for name in columns]
    ends = matrices[0][1]
    for name, (_, others) in zip(columns, matrices, strict=True):
        lengths, theirs, ours = np.diff(token_ends), np.diff(others), np.diff(ends)
        wrong = np.flatnonzero((theirs != ours) | (theirs > lengths) | (theirs < lengths - 1))
        if len(wrong):
            row = wrong[0]
            raise UserError(
                f"Expected a signal for each token but the last, but row {number + row} of {file} has {lengths[row]} "
                f"ids, {ours[row]} of `{columns[0]}` and {theirs[row]} of `{name}`: write that row again, or leave it "
                "out."
            )
    values = [matrix for matrix, _ in matrices]
    if coding is None:
        ids, log_probs = values[0].astype(np.int64), values[1].astype(np.float32)
    else:
        ids, log_probs = coding.decode(*values, where)
    if not isinstance(coding, Compressed):
        log_probs = _normalised(log_probs)
    error = np.zeros(len(ids))
    if coding is not None:
        if exact_only:
            ids, log_probs = ids[:, : coding.exact_k], log_probs[:, : coding.exact_k]
        elif coding.exact_k < coding.k:  # what a polynomial says of them may be far from what they were
            error += np.inf
        error += coding.rounding * (np.exp(np.minimum(log_probs, 0)) * np.abs(log_probs)).sum(-1, dtype=np.float64)
    marks = None
    if "attention_mask" in batch.schema.names:
        marks, mark_ends = _flat(batch.column("attention_mask"), "attention_mask", where)
        if not np.array_equal(mark_ends, token_ends):
            raise UserError(
                f"Expected as many values under `attention_mask` as ids, but {where} have {len(marks)} and "
                f"{len(tokens)}: write the source again."
            )
    for row in range(len(batch)):
        begin, end = token_ends[row : row + 2]
        mine = slice(ends[row], ends[row + 1])
        of_row = None if marks is None else marks[begin:end]
        listed = Likeliest(ids[mine], log_probs[mine], error[mine])
        yield from _documents(tokens[begin:end].astype(np.int64), of_row, listed, f"row {number + row} of {file}")


def _documents(tokens: np.ndarray, marks: np.ndarray | None, listed: Likeliest, where: str) -> Iterator[Told]:
    """Yield the documents of a row, of which marks [L] number them; 0 is padding."""
    length, given = len(tokens), len(listed.ids)
    marks = np.ones(length, dtype=np.int64) if marks is None else marks
    cuts = np.flatnonzero(np.diff(marks)) + 1
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
        rows = slice(begin, min(end, given))
        if marks[begin] == 0 or rows.start >= rows.stop:
            continue
        document = tokens[begin:end]
        padded = end == length and given < length  # one token of the row has no signal
        documents = (document, document[:-1]) if padded else (document,)
        positions = np.arange(rows.stop - rows.start)
        yield Told(where, documents, positions, Likeliest(*(part[rows] for part in listed)))


def _normalised(values: np.ndarray) -> np.ndarray:
    """Return log-probabilities [m, k] of what may be logits: a token with a value above 0 has these."""
    wide = values.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    sums = np.log(np.exp(wide - largest).sum(-1, keepdims=True)) + largest
    return np.where(largest > 0, wide - sums, wide)


def _flat(column: pyarrow.Array, name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of lists, one after the other, and where each list begins and the last one ends."""
    values, offsets = _inner(column, name, where)
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        raise UserError(
            f"Expected lists of numbers under `{name}`, but {where} have lists of lists: name the source again."
        )
    return _numbers(values, name, where), offsets


def _matrix(column: pyarrow.Array, name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return lists of lists of one length as a matrix, and where each outer list begins and the last one ends."""
    tokens, offsets = _inner(column, name, where)
    values, inner = _inner(tokens, name, where)
    widths = np.diff(inner)
    if len(widths) and (widths != widths[0]).any():
        raise UserError(
            f"Expected as many values of every token under `{name}`, but {where} have tokens with {widths.min()} and "
            f"with {widths.max()}: write the source again."
        )
    width = int(widths[0]) if len(widths) else 0
    return _numbers(values, name, where).reshape(len(widths), width), offsets


def _inner(column: pyarrow.Array, name: str, where: str) -> tuple[pyarrow.Array, np.ndarray]:
    """Return what the lists of a column hold, one after the other, and where each begins and the last one ends."""
    kind = column.type
    if pyarrow.types.is_fixed_size_list(kind):
        column = column.cast(pyarrow.large_list(kind.value_type))
        kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        raise UserError(f"Expected lists under `{name}`, but {where} have {kind}: name a source that DistillKit wrote.")
    if column.null_count:
        raise UserError(
            f"Expected lists under `{name}`, but {where} have {column.null_count} empty cells: leave them out."
        )
    offsets = column.offsets.to_numpy().astype(np.int64)
    return column.values[offsets[0] : offsets[-1]], offsets - offsets[0]


def _numbers(values: pyarrow.Array, name: str, where: str) -> np.ndarray:
    numeric = pyarrow.types.is_integer(values.type) or pyarrow.types.is_floating(values.type)
    if values.null_count or not numeric:
        raise UserError(
            f"Expected numbers under `{name}`, but {where} have {values.type}: name a source that DistillKit wrote."
        )
    found = values.to_numpy(zero_copy_only=False)
    return found.astype(np.uint8) if name in Compressed.columns else found
