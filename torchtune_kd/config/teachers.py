"""``teachers``: several teachers, or the student's own past, in place of one ``teacher_model`` or ``teacher_cache``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig

from torchtune_kd.config.sections import Section, section_of
from torchtune_kd.config.settings import TEACHER_HEADS, TEACHER_WEIGHTS, typed
from torchtune_kd.errors import UserError, nearest

MIXES = ("probabilities", "logits")  # what `ensemble` may name
OWN = ("base", "ema")  # what `self` may name
_OF_AVERAGE = ("decay", "every_n_steps")
_FIELDS = {
    "name": str | None, "share": float | None, "cache": str | None, "tail": str | None, "head": str | None,
    "weights": str | None, "self": str | None, "decay": float, "every_n_steps": int,
}  # fmt: skip
_SECTIONS = ("model", "checkpointer")
_LISTS = ("datasets",)
_FLAT = (
    "teacher_model", "teacher_checkpointer", "teacher_cache", "teacher_tail", "teacher_head", "teacher_weights",
)  # fmt: skip


@dataclass(frozen=True)
class TeacherEntry:
    """One of ``teachers``.

    Attributes:
        path (str): dotted key, for messages.
        name (str): what it is called.
        share (float): weight in the ensemble.
        model (Section | None): of a teacher that runs, with the next.
        checkpointer (Section | None): its files; None with ``random_weights: True``.
        cache (str | None): folder of a teacher that ran once.
        tail (str | None): as ``teacher_tail``.
        head (str | None): as ``teacher_head``.
        weights (str | None): as ``teacher_weights``.
        datasets (tuple[int, ...]): positions under ``dataset`` of the rows that it teaches; empty for all.
        own (str | None): "base" or "ema": the student itself, without its adapters, or averaged over its steps.
        decay (float): of the average, for each of its updates.
        every_n_steps (int): optimizer steps between two updates of the average.
    """

    path: str
    name: str
    share: float
    model: Section | None = None
    checkpointer: Section | None = None
    cache: str | None = None
    tail: str | None = None
    head: str | None = None
    weights: str | None = None
    datasets: tuple[int, ...] = ()
    own: str | None = None
    decay: float = 0.999
    every_n_steps: int = 1


def read_teachers(written: DictConfig, *, random_weights: bool) -> tuple[TeacherEntry, ...]:
    """Read the list under ``teachers``; a config without one gives none.

    Args:
        written (DictConfig): a run's config.
        random_weights (bool): whether a model may be without files.

    Raises:
        UserError: for an entry that is no teacher, or none that there can be, and shares that do not add up to 1.
    """
    node = written.get("teachers")
    if node is None:
        if written.get("ensemble") is not None:
            raise UserError("`ensemble` says how several `teachers` are mixed, but there are none: delete it.")
        return ()
    for key in _FLAT:
        if written.get(key) is not None:
            raise UserError(f"`teachers` and `{key}` both say who teaches: delete one of them.")
    if not isinstance(node, ListConfig | list) or not node:
        raise UserError(f"Expected `teachers` to be a list with an entry for each teacher, got {node!r}: write one.")
    mix = written.get("ensemble", MIXES[0])
    if mix not in MIXES:
        raise UserError(f"Expected `ensemble` to be {' or '.join(MIXES)}, got {mix!r}: change it.")
    entries = tuple(_entry(index, entry, len(node), random_weights) for index, entry in enumerate(node))
    if any(entry.datasets for entry in entries):
        _check_specialists(entries, written)
    total = math.fsum(entry.share for entry in entries)
    if abs(total - 1) > 1e-5:
        raise UserError(f"Expected the shares of `teachers` to add up to 1, but they add up to {total:g}: change them.")
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise UserError(f"Two of `teachers` are called {entry.name!r}: give them names of their own under `name`.")
    in_8_bits = [entry for entry in entries if entry.head is not None]
    if mix == "logits" and len(entries) > 1 and in_8_bits and not entries[0].datasets:
        raise UserError(
            f"`ensemble: logits` adds up products with heads, which those of `{in_8_bits[0].path}.head: "
            f"{in_8_bits[0].head}` cannot be: delete that key, or write `ensemble: probabilities`."
        )
    own = [entry for entry in entries if entry.own is not None]
    if len(own) > 1:
        raise UserError(f"`{own[1].path}` is the student itself, as `{own[0].path}` is: keep one of them.")
    return entries


def _entry(index: int, node: Any, count: int, random_weights: bool) -> TeacherEntry:
    path = f"teachers[{index}]"
    if not isinstance(node, Mapping | DictConfig):
        raise UserError(f"Expected `{path}` to be a section with a model, a cache or `self`, got {node!r}: write one.")
    known = (*_FIELDS, *_SECTIONS, *_LISTS)
    for key in node:
        if key not in known:
            raise UserError(f"Unknown key `{path}.{key}`: {nearest(str(key), known)}")
    values = {str(key): typed(f"{path}.{key}", node[key], _FIELDS[str(key)]) for key in node if key in _FIELDS}
    kinds = [key for key in ("model", "cache", "self") if node.get(key) is not None]
    if len(kinds) != 1:
        found = " and ".join(f"`{kind}`" for kind in kinds) or "none of them"
        raise UserError(f"Expected `{path}` to have either `model`, `cache` or `self`, but it has {found}: change it.")
    (kind,) = kinds
    if kind == "model" and node.get("checkpointer") is None and not random_weights:
        raise UserError(f"Expected `{path}.checkpointer` to name the files of that teacher, but it is missing: add it.")
    of_kind = {
        "checkpointer": "model",
        "tail": "cache",
        "head": "model",
        "weights": "model",
        **dict.fromkeys(_OF_AVERAGE, "self"),
    }
    for key, needed in of_kind.items():
        if node.get(key) is not None and kind != needed and not (key == "head" and kind == "cache"):
            raise UserError(
                f"`{path}.{key}` belongs to a teacher with `{needed}`, but this one has `{kind}`: delete it."
            )
    for key, words in (("head", TEACHER_HEADS), ("weights", TEACHER_WEIGHTS), ("tail", ("renormalise",))):
        if values.get(key) is not None and values[key] not in words:
            raise UserError(f"Expected `{path}.{key}` to be {' or '.join(words)}, got {values[key]!r}: change it.")
    own = values.get("self")
    if own is not None and own not in OWN:
        raise UserError(f"Expected `{path}.self` to be {' or '.join(OWN)}, got {own!r}: change it.")
    for key in _OF_AVERAGE:
        if key in values and own != "ema":
            raise UserError(f"`{path}.{key}` belongs to `self: ema`: delete it.")
    share = values.get("share")
    entry = TeacherEntry(
        path=path,
        name=str(values.get("name") or own or f"teacher {index + 1}"),
        share=1 / count if share is None else float(share),
        model=section_of(f"{path}.model", node["model"]) if kind == "model" else None,
        checkpointer=section_of(f"{path}.checkpointer", node["checkpointer"]) if node.get("checkpointer") else None,
        cache=values.get("cache"),
        tail=values.get("tail"),
        head=values.get("head"),
        weights=values.get("weights"),
        datasets=_positions(path, node.get("datasets")),
        own=own,
        decay=float(values.get("decay", TeacherEntry.decay)),
        every_n_steps=int(values.get("every_n_steps", TeacherEntry.every_n_steps)),
    )
    _check_numbers(entry)
    return entry


def _positions(path: str, node: Any) -> tuple[int, ...]:
    """Read ``datasets``."""
    if node is None:
        return ()
    values = list(node) if isinstance(node, ListConfig | list) else [node]
    if not values or any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise UserError(
            f"Expected `{path}.datasets` to be a list of positions under `dataset`, counted from 0, got {node!r}: "
            "change it."
        )
    return tuple(values)


def _check_specialists(entries: Sequence[TeacherEntry], written: DictConfig) -> None:
    """Refuse a row with two teachers, or with none."""
    lists = {name: written.get(name) for name in ("dataset", "dataset_val")}
    counts = {
        name: len(node) if isinstance(node, ListConfig) else 1 for name, node in lists.items() if node is not None
    }
    taught: dict[int, TeacherEntry] = {}
    for entry in entries:
        if not entry.datasets:
            raise UserError(
                f"Expected `{entry.path}.datasets`, since other teachers have them, but it is missing: say which rows "
                "it teaches."
            )
        if entry.share != 1 / len(entries):
            raise UserError(f"`{entry.path}.share` is for rows with several teachers, but each has one: delete it.")
        for position in entry.datasets:
            if position in taught:
                raise UserError(
                    f"`{taught[position].path}` and `{entry.path}` both teach the rows of `dataset[{position}]`: a row "
                    "has one teacher, so delete it under one of them."
                )
            taught[position] = entry
    for name, count in counts.items():
        if set(taught) != set(range(count)):
            raise UserError(
                f"Expected a teacher for each of the {count} parts of `{name}`, but the `datasets` of `teachers` are "
                f"{', '.join(map(str, sorted(taught)))}: name each position from 0 to {count - 1} once."
            )


def _check_numbers(entry: TeacherEntry) -> None:
    for name, good, expected in (
        ("share", entry.share > 0, "above 0"),
        ("decay", 0 <= entry.decay < 1, "from 0 to below 1"),
        ("every_n_steps", entry.every_n_steps >= 1, "at least 1"),
    ):
        if not good:
            raise UserError(f"Expected `{entry.path}.{name}` to be {expected}, got {getattr(entry, name)}: change it.")
