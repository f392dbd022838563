"""Prose to train on and prose to judge by: documents without repeats, split, cut into passages of tokens."""

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtune.modules.transforms.tokenizers import ModelTokenizer

from torchtune_kd.errors import UserError

Documents = dict[str, str]  # name: text

_PARAGRAPH_END = re.compile(r"\n\s*\n")
_PROSE = re.compile(r"[A-Z][^\n]{40,}\n.{120,}", re.DOTALL)  # a paragraph of several lines, not a heading or code
_PROMPT_WORDS = 16
_WORD = re.compile(r"\s*\S+|\s+$")  # with the space in front: no token of a byte-level BPE spans two of them
_REPEAT_LENGTH = 40  # characters from which an equal paragraph counts as a repeat, not as a phrase
_NUM_DOCUMENTS = 100  # that a single file is cut into, about
_MIN_DOCUMENT = 1000  # characters of such a document
_ROW_SHIFT = 0.618  # golden ratio: how far, in rows, each pass over the text moves its cuts


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents held out; no paragraph stands in both."""

    train: Documents
    held_out: Documents


def reference_documents() -> Documents:
    """Read the reference prose on the Python language that comes with CPython, by topic."""
    from pydoc_data.topics import topics

    return dict(topics)


def read_documents(file: Path) -> Documents:
    """Cut a text file at blank lines into about 100 documents of at least 1000 characters."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Expected a text file in UTF-8, but {file} cannot be read ({error}): give another file under --text."
        ) from error
    length = max(_MIN_DOCUMENT, len(text) // _NUM_DOCUMENTS)
    documents: Documents = {}
    document = ""
    for paragraph in _PARAGRAPH_END.split(text.strip()):
        document = f"{document}\n\n{paragraph}" if document else paragraph
        if len(document) >= length:
            documents[f"part {len(documents) + 1}"] = document
            document = ""
    if document:
        documents[f"part {len(documents) + 1}"] = document
    return documents


def without_repeats(documents: Mapping[str, str]) -> Documents:
    """Leave out what a longer document says in the same words.

    Reference works repeat whole sections under several headings, so that a split by document alone would let the
    held-out text stand in the training text. Paragraphs of at least 40 characters are kept where they come first,
    longest document first; a document of which less than half is left is dropped.
    """
    seen: set[str] = set()
    kept: Documents = {}
    for name in sorted(documents, key=lambda name: (-len(documents[name]), name)):
        paragraphs = [p for p in _PARAGRAPH_END.split(documents[name].strip("\n")) if p.strip()]
        fresh = []
        for paragraph in paragraphs:
            words = " ".join(paragraph.split())
            if len(words) < _REPEAT_LENGTH or words not in seen:
                fresh.append(paragraph)
            seen.add(words)
        if 2 * sum(map(len, fresh)) >= sum(map(len, paragraphs)) > 0:
            kept[name] = "\n\n".join(fresh)
    return kept


def split_documents(documents: Mapping[str, str], share: float = 0.05) -> Split:
    """Hold out whole documents, at most ``share`` of the characters; which ones follows from their text alone.

    Each takes at most half of what may still be held out, so that no single one rules the result.

    Raises:
        UserError: if there are too few documents to hold one out.
    """
    documents = without_repeats(documents)
    budget = share * sum(map(len, documents.values()))
    held_out: Documents = {}
    for name in sorted(documents, key=lambda name: hashlib.sha256(documents[name].encode()).digest()):
        if 2 * len(documents[name]) <= budget:
            held_out[name] = documents[name]
            budget -= len(documents[name])
    train = {name: text for name, text in documents.items() if name not in held_out}
    if not held_out or not train:
        characters = sum(map(len, documents.values()))
        raise UserError(
            f"Expected enough text to hold a twentieth of it out, but it has {characters} characters in "
            f"{len(documents)} documents without repeats: give at least {40 * _MIN_DOCUMENT} characters under --text."
        )
    return Split(train=train, held_out=held_out)


def passages(tokenizer: ModelTokenizer, text: str, num_tokens: int, first: int | None = None) -> list[str]:
    """Cut a text between words into pieces of at most ``num_tokens`` tokens, the first one of at most ``first``.

    The pieces joined are the text, and the tokens of the pieces joined are its tokens.
    """
    rows: list[str] = []
    row, size, limit = "", 0, first or num_tokens
    for word, count in _words(tokenizer, text):
        if row and size + count > limit:
            rows.append(row)
            row, size, limit = "", 0, num_tokens
        row, size = row + word, size + count
    return [*rows, row] if row else rows


def training_passages(
    tokenizer: ModelTokenizer, documents: Mapping[str, str], num_tokens: int, num_rows: int, seed: int = 0
) -> list[str]:
    """Draw ``num_rows`` passages in random order, in as many passes over the documents as that takes.

    Every pass cuts at other places, so that a token is seen with another context each time.
    """
    text = joined(documents)
    rows: list[str] = []
    number = 0
    while len(rows) < num_rows:
        first = 1 + int(num_tokens * (number * _ROW_SHIFT % 1)) if number else None
        one_pass = passages(tokenizer, text, num_tokens, first)
        random.Random(seed + number).shuffle(one_pass)
        rows += one_pass
        number += 1
    return rows[:num_rows]


def repeated_passages(one_pass: Sequence[str], num_rows: int, different: int) -> list[str]:
    """Draw ``num_rows`` passages in as many passes as that takes, each over the same passages in another order.

    Args:
        one_pass (Sequence[str]): the passages of a text.
        num_rows (int): passages to return.
        different (int): of the text's to draw from.
    """
    kept = list(one_pass)
    random.Random(0).shuffle(kept)
    del kept[different:]
    rows: list[str] = []
    for number in range(-(-num_rows // len(kept))):
        rows += random.Random(number).sample(kept, len(kept))
    return rows[:num_rows]


def held_out_prompts(documents: Documents, count: int) -> list[str]:
    """Choose beginnings of prose: one of each document, longest first, then more of them, then of any words."""
    firsts, others = [], []
    for name in sorted(documents, key=lambda name: (-len(documents[name]), name)):
        prose = [paragraph for paragraph in documents[name].split("\n\n") if _PROSE.fullmatch(paragraph)]
        firsts += prose[:1]
        others += prose[1:]
    words = joined(documents).split()
    anywhere = [" ".join(words[i * len(words) // count :]) for i in range(count)]
    prompts = dict.fromkeys(" ".join(found.split()[:_PROMPT_WORDS]) for found in [*firsts, *others, *anywhere])
    return list(prompts)[:count]


def joined(documents: Mapping[str, str]) -> str:
    """Join the documents one after the other, by name."""
    return "\n\n".join(documents[name] for name in sorted(documents))


def write_rows(file: Path, rows: list[str]) -> None:
    """Write one JSON object ``{"text": row}`` a line, as ``text_completion_dataset`` reads them."""
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps({"text": row}, ensure_ascii=False) + "\n")


def _words(tokenizer: ModelTokenizer, text: str) -> Iterator[tuple[str, int]]:
    @functools.cache
    def count(word: str) -> int:
        return len(tokenizer.encode(word, add_bos=False, add_eos=False))

    for match in _WORD.finditer(text):
        yield match.group(), count(match.group())
