"""Rows of JSON lines and of Parquet files, each with its place for errors."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from torchtune_kd.errors import UserError, first_line

JSON, PARQUET = (".jsonl", ".json", ".ndjson"), (".parquet",)
Row = dict[str, Any]


def source_files(source: Path, endings: Sequence[str]) -> list[Path]:
    """Return the files of a source: itself, or those with one of these endings anywhere in its folder, in order.

    Raises:
        UserError: if there are none.
    """
    if source.is_file():
        return [source]
    files = sorted(file for file in source.rglob("*") if file.suffix in endings and file.is_file())
    if not files:
        raise UserError(
            f"Expected a file or a folder with {' or '.join(f'*{ending}' for ending in endings)}, but {source} has "
            "none: check the path."
        )
    return files


def read_rows(files: Sequence[Path]) -> Iterator[tuple[str, Row]]:
    """Yield each row of JSON lines or Parquet files with its place."""
    for file in files:
        yield from _parquet_rows(file) if file.suffix in PARQUET else _json_rows(file)


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"Expected a JSON object in every line, but line {number} of {file} is no JSON "
                    f"({first_line(error)}): correct or delete that line."
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"Expected a JSON object in every line, but line {number} of {file} is a {type(row).__name__}: "
                    "correct or delete that line."
                )
            yield f"line {number} of {file}", row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    for batch in parquet_batches(file, None):
        for row in batch.to_pylist():
            yield f"row {number} of {file}", {key: value for key, value in row.items() if value is not None}
            number += 1


def parquet_batches(file: Path, columns: Sequence[str] | None, rows: int = 64) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a Parquet file, so many at a time.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(rows, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"Expected a Parquet file, but {file} cannot be read as one ({first_line(error)}): fetch it again."
        ) from error


def needed(row: Row, name: str, kind: type, where: str, what: str) -> Any:
    """Return what a row has under ``name``.

    Raises:
        UserError: if it is not there, or no ``kind``.
    """
    value = row.get(name)
    if not isinstance(value, kind):
        got = f"has none but {', '.join(list(row)[:8])}" if value is None else f"has a {type(value).__name__}"
        raise UserError(
            f"Expected {what} under `{name}`, but {where} {got}: write the source with it, or name another."
        )
    return value


def token_ids(row: Row, name: str, where: str) -> np.ndarray:
    """Return the ids [L] int64 that a row has under ``name``.

    Raises:
        UserError: if they are not there, or no ids.
    """
    values = needed(row, name, list, where, "a list of the document's token ids")
    if not values or any(not isinstance(value, int) or value < 0 for value in values):
        raise UserError(
            f"Expected a list of token ids under `{name}`, but {where} has another or an empty one: write the source "
            "with the ids that the teacher read."
        )
    return np.array(values, dtype=np.int64)
