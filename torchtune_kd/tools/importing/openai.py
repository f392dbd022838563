"""Chat completions of OpenAI's API, or of a server that speaks it, as JSON lines.

A row is a response (``choices[0].logprobs.content``, a token each with its ``top_logprobs``, at most 20) with one field
more, from which its prompt is known: ``prompt_token_ids``, or the ``messages`` of the request, which the config's
tokenizer lays out together with the answer. Only the answer's tokens have a signal: what a document says of its prompt
is not there, and the token that ends the answer is there only where the API lists it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_kd.errors import UserError
from torchtune_kd.tools.importing.messages import TokenIds, conversation
from torchtune_kd.tools.importing.rows import JSON, Row, needed, read_rows, source_files, token_ids
from torchtune_kd.tools.importing.told import Told
from torchtune_kd.tools.importing.vllm import Entries, told


def read_openai(source: Path, tokenizer: Any, vocab: int, *, ambiguous_to_rest: bool = False) -> Iterator[Told]:
    """Yield what each answer's tokens are followed by.

    Args:
        source (Path): a file, or a folder of them.
        tokenizer (Any): of the config.
        vocab (int): ids of the models.
        ambiguous_to_rest (bool): leave a listed token out whose text is not that of one id alone, so that its mass
            counts to the rest.

    Raises:
        UserError: for a row without these fields, or with text that is not that of one id.
    """
    ids = TokenIds(tokenizer, vocab)
    for where, row in read_rows(source_files(source, JSON)):
        choice = _choice(row, where)
        content = _content(choice, where)
        answer = np.array([_id(ids, each, where) for each in content], dtype=np.int64)
        document, begin = _document(row, choice, answer, tokenizer, where)
        entries = {
            begin + at - 1: _entries(ids, each, int(answer[at]), where, drop=ambiguous_to_rest)
            for at, each in enumerate(content)
        }
        if entries:
            yield told(where, (document,), entries)


def _choice(row: Row, where: str) -> Row:
    choices = needed(row, "choices", list, where, "a chat completion")
    if not choices or not isinstance(choices[0], dict):
        raise UserError(f"Expected an answer under `choices`, but {where} has none: leave that row out.")
    return choices[0]


def _content(choice: Row, where: str) -> list[Mapping[str, Any]]:
    content = (choice.get("logprobs") or {}).get("content")
    listed = isinstance(content, list) and all(isinstance(each, dict) and each.get("top_logprobs") for each in content)
    if not listed:
        raise UserError(
            f"Expected tokens with `top_logprobs` under choices[0].logprobs.content, but {where} has none: ask the API "
            "for them with `logprobs: true` and `top_logprobs: 20`."
        )
    return content


def _id(ids: TokenIds, entry: Mapping[str, Any], where: str) -> int:
    found = ids.find(entry, where)
    if found is None:
        raise _ambiguous(entry, where)
    return found


def _ambiguous(entry: Mapping[str, Any], where: str) -> UserError:
    return UserError(
        f"Expected tokens whose text is that of one id, but {entry['token']!r} at {where} is that of several or none: "
        "ask a vLLM server for ids with `return_tokens_as_token_ids`, name the teacher's tokenizer, or pass "
        "--ambiguous-to-rest to leave such tokens out where they were not drawn."
    )


def _entries(ids: TokenIds, given: Mapping[str, Any], drawn: int, where: str, *, drop: bool) -> Entries:
    """Return ids and log-probabilities of a position, that of the drawn token once."""
    found: dict[int, float] = {}
    for entry in given["top_logprobs"]:
        index = ids.find(entry, where)
        if index is None and not drop:
            raise _ambiguous(entry, where)
        if index is not None:
            found[index] = _number(entry, where)
    found.setdefault(drawn, _number(given, where))
    return list(found.items())


def _number(entry: Mapping[str, Any], where: str) -> float:
    value = entry.get("logprob")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"Expected a number under `logprob`, but {where} has {value!r}: correct that row.")
    return float(value)


def _document(row: Row, choice: Row, answer: np.ndarray, tokenizer: Any, where: str) -> tuple[np.ndarray, int]:
    """Return the ids of prompt and answer, and where the answer begins."""
    if row.get("prompt_token_ids") is not None:
        prompt = token_ids(row, "prompt_token_ids", where)
        return np.concatenate([prompt, answer]), len(prompt)
    messages = needed(row, "messages", list, where, "the request's messages (or its prompt under `prompt_token_ids`)")
    said = (choice.get("message") or {}).get("content") or ""
    document = conversation(tokenizer, [*messages, {"role": "assistant", "content": said}], where)
    for begin in range(len(document) - len(answer), 0, -1):
        if np.array_equal(document[begin : begin + len(answer)], answer):
            return document, begin
    raise UserError(
        f"Expected the answer's ids in the conversation, but the config's tokenizer gives the text of {where} other "
        "ids than the API: name the teacher's tokenizer, or leave that row out."
    )
