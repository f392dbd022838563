"""Rows of axolotl's offline distillation, as JSON lines or Parquet.

A row has the document as ``input_ids``, or as ``messages``, which the config's tokenizer lays out, and a list of T
positions, of which each lists ids with log-probabilities at T = 1, in one of three ways:

    logprobs          lists of {"token": "token_id:NN", "logprob": x}
    logprobs          lists of numbers, whose ids are in ``target_token_ids``
    target_logprobs   the same as axolotl prepares it: normalised over these ids, so that the rest is not known

Which tokens are meant is a matter of axolotl's version, and of what its chat template puts behind an answer: position t
of T says which token t, t + 1, or one from about L - T on is likely. So the documents decide, all of them together: the
place is taken at which the most tokens are among the listed ids.

Shapes: L tokens of a document, T positions of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchtune_kd.errors import UserError
from torchtune_kd.tools.importing.messages import TOKEN_ID, conversation
from torchtune_kd.tools.importing.rows import JSON, PARQUET, Row, needed, read_rows, source_files, token_ids
from torchtune_kd.tools.importing.told import UNLIKELY, Told
from torchtune_kd.tools.importing.vllm import Entries, told

_PREPARED = "target_logprobs"
_BEHIND = 4  # tokens that a chat template may put behind an answer
_AMONG = 0.5  # of a document's tokens have to be among the listed ids, where these are the likeliest


def read_axolotl(
    source: Path, tokenizer: Any, logprobs_field: str = "logprobs", messages_field: str = "messages"
) -> Iterator[Told]:
    """Yield what each document's tokens are followed by.

    Args:
        source (Path): a file, or a folder of them.
        tokenizer (Any): of the config.
        logprobs_field (str): axolotl's key of that name.
        messages_field (str): its ``field_messages``.

    Raises:
        UserError: for a row without these fields, or whose document's tokens are not among the ids.
    """
    files = source_files(source, (*JSON, *PARQUET))
    fields = tokenizer, logprobs_field, messages_field
    place = _most_likely_place(_documents(files, *fields))
    for document in _documents(files, *fields):
        begin = place.first_token(document)
        if _hits(document, begin)[0] < _AMONG * sum(map(bool, document.listed)):
            raise UserError(
                f"Expected the document's tokens among the ids of their positions, but at {document.where} they are "
                "not, wherever axolotl may have put them: name the teacher's tokenizer and template, or leave that row "
                "out."
            )
        entries = {
            begin + at - 1: each
            for at, each in enumerate(document.listed)
            if each and 0 < begin + at < len(document.tokens)
        }
        yield told(document.where, (document.tokens,), entries)


class _Document(NamedTuple):
    where: str
    tokens: np.ndarray
    listed: list[Entries]  # of each position
    by_id: list[dict[int, float]]  # the same


class _Place(NamedTuple):
    """Say which token the first position of a row is about."""

    from_the_end: bool  # counted from token L - T instead of the first one
    offset: int

    def first_token(self, document: _Document) -> int:
        start = len(document.tokens) - len(document.listed) if self.from_the_end else 0
        return max(0, start + self.offset)


_PLACES = (_Place(False, 0), _Place(False, 1), *(_Place(True, offset) for offset in range(-_BEHIND, 2)))


def _documents(files: Sequence[Path], tokenizer: Any, logprobs_field: str, messages_field: str) -> Iterator[_Document]:
    for where, row in read_rows(files):
        if row.get("input_ids") is not None:
            tokens = token_ids(row, "input_ids", where)
        else:
            messages = needed(
                row, messages_field, list, where, "the document's messages (or its ids under `input_ids`)"
            )
            tokens = conversation(tokenizer, messages, where)
        listed = [_likely(each) for each in _listed(row, logprobs_field, where)]
        if not any(listed):
            raise UserError(f"Expected log-probabilities, but {where} has none: leave that row out.")
        yield _Document(where, tokens, listed, [dict(each) for each in listed])


def _most_likely_place(documents: Iterable[_Document]) -> _Place:
    """Return the place with the most tokens, then mass, among the listed ids, over all documents."""
    found = dict.fromkeys(_PLACES, (0, 0.0))
    for document in documents:
        for place, (hits, mass) in found.items():
            more, heavier = _hits(document, place.first_token(document))
            found[place] = hits + more, mass + heavier
    return max(found, key=lambda place: found[place])


def _hits(document: _Document, begin: int) -> tuple[int, float]:
    """Return how many tokens are among the ids of their positions, and their mass, if the first is about `begin`."""
    hits, mass = 0, 0.0
    for token, log_probs in zip(document.tokens[begin:].tolist(), document.by_id, strict=False):
        found = log_probs.get(token)
        if found is not None:
            hits, mass = hits + 1, mass + float(np.exp(min(found, 0.0)))
    return hits, mass


def _listed(row: Row, logprobs_field: str, where: str) -> list[Entries]:
    """Return ids and log-probabilities of each position."""
    name = _PREPARED if row.get(logprobs_field) is None and _PREPARED in row else logprobs_field
    given = needed(row, name, list, where, "axolotl's log-probabilities")
    ids = row.get("target_token_ids")
    try:
        if ids is None:
            return [[_pair(entry) for entry in each or ()] for each in given]
        if len(ids) != len(given):
            raise UserError(
                f"Expected as many positions under `target_token_ids` as under `{name}`, but {where} has {len(ids)} "
                f"and {len(given)}: write that row again, or leave it out."
            )
        return [
            [(int(index), float(value)) for index, value in zip(own or (), each or (), strict=True)]
            for own, each in zip(ids, given, strict=True)
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"Expected lists of ids with log-probabilities under `{name}`, but those of {where} are other ones: write "
            f'each as {{"token": "{TOKEN_ID}NN", "logprob": x}}, or with ids under `target_token_ids`.'
        ) from error


def _pair(entry: Any) -> tuple[int, float]:
    if not entry["token"].startswith(TOKEN_ID):
        raise ValueError(entry["token"])
    return int(entry["token"].removeprefix(TOKEN_ID)), float(entry["logprob"])


def _likely(entries: Entries) -> Entries:
    """Leave out what pads."""
    return [(index, value) for index, value in entries if not value <= UNLIKELY]
