"""vLLM's log-probabilities of a prompt, as JSON lines.

A row has ``prompt_token_ids`` [L] and ``prompt_logprobs`` [L], at its top or in ``choices[0]``, as a ``RequestOutput``
or a response of the server has them: null for the first token, then a mapping from id to log-probability, or to
``{"logprob", "rank", "decoded_token"}``. Entry i is of token i, so that it says what follows token i - 1. It holds the
token itself, also where that is not among the likeliest. They are at T = 1 whatever the request said.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_kd.caches.log_probs import NONE
from torchtune_kd.errors import UserError
from torchtune_kd.tools.importing.rows import JSON, Row, needed, read_rows, source_files, token_ids
from torchtune_kd.tools.importing.told import Likeliest, Told

Entries = list[tuple[int, float]]  # ids and log-probabilities of a position


def read_vllm(source: Path) -> Iterator[Told]:
    """Yield what each document's tokens are followed by.

    Raises:
        UserError: for a row that has no such fields, or fields that do not fit together.
    """
    for where, whole in read_rows(source_files(source, JSON)):
        row = _with_choice(whole)
        tokens = token_ids(row, "prompt_token_ids", where)
        given = needed(row, "prompt_logprobs", list, where, "vLLM's log-probabilities of the prompt")
        if len(given) != len(tokens):
            raise UserError(
                f"Expected an entry of `prompt_logprobs` for each token, but {where} has {len(given)} for "
                f"{len(tokens)} ids: write that row again, or leave it out."
            )
        entries = {at - 1: _entries(each, where) for at, each in enumerate(given) if at and each}
        if entries:
            yield told(where, (tokens, tokens[:-1]), entries)


def told(where: str, documents: tuple[np.ndarray, ...], entries: Mapping[int, Entries]) -> Told:
    """Return what a source says of a document from what it lists of each position."""
    width = max(len(each) for each in entries.values())
    ids = np.full((len(entries), width), NONE, dtype=np.int64)
    log_probs = np.zeros((len(entries), width))
    for at, each in enumerate(entries.values()):
        ids[at, : len(each)] = [index for index, _ in each]
        log_probs[at, : len(each)] = [value for _, value in each]
    return Told(where, documents, np.array(list(entries), dtype=np.int64), Likeliest(ids, log_probs))


def _with_choice(row: Row) -> Row:
    """Return a row with what its first choice says beside it, where a server's response has it there."""
    choices = row.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    return {
        **{key: value for key, value in first.items() if value is not None},
        **{k: v for k, v in row.items() if v is not None},
    }


def _entries(entry: Any, where: str) -> Entries:
    try:
        return [
            (int(index), float(value["logprob"] if isinstance(value, dict) else value))
            for index, value in entry.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Expected ids with log-probabilities in `prompt_logprobs`, but {where} has {str(entry)[:80]}: write it as "
            "vLLM gives it."
        ) from error
