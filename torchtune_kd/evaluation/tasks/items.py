"""A question with its choices, and files of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtune_kd.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context (str): what the model reads; no white space at its end.
        choices (tuple[str, ...]): what may follow, each with the white space before it.
        answer (int): index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


def items_fingerprint(items: Sequence[Item]) -> str:
    """Return a fingerprint of questions, choices and answers, in their order."""
    content = [[item.context, item.choices, item.answer] for item in items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_items(file: Path) -> list[Item]:
    """Read questions from a file of one JSON object a line.

    ``{"context": "The capital of France is", "choices": ["Berlin", "Paris"], "answer": 1}``; the answer is an index
    or one of the choices. A choice that begins without white space follows the context after one space.

    Raises:
        UserError: if the file cannot be read, is empty, or a line is no question.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The task {file} cannot be read ({error}): name a file of one JSON object a line.") from error
    items = [_item(line, f"line {number} of {file}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise UserError(f"Expected at least one question in {file}, but it is empty: add some.")
    return items


def _item(line: str, where: str) -> Item:
    try:
        content: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"Expected one JSON object a line, but {where} is none ({error}): correct it.") from error
    wanted = {"context", "choices", "answer"}
    if not isinstance(content, dict) or not wanted <= content.keys():
        raise UserError(f"Expected `context`, `choices` and `answer` in {where}: add what is missing.")
    context, choices, answer = content["context"], content["choices"], content["answer"]
    if not isinstance(context, str) or not context.strip():
        raise UserError(f"Expected a text under `context` in {where}, got {context!r}: write the question.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"Expected two texts or more under `choices` in {where}, got {choices!r}: correct them.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(
            f"Expected the right answer among the {len(choices)} choices of {where}, as one of them or an index from "
            f"0 to {len(choices) - 1}, got {answer!r}: correct it."
        )
    return Item(context.rstrip(), tuple(c if c[0].isspace() else f" {c}" for c in choices), answer)
