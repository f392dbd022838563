"""Refuse to compare what is not comparable: each mistake is one sentence that says what to measure again."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torchtune_kd.errors import UserError
from torchtune_kd.reports.results import Result

# tasks of figures about a model or its training, which have no items; anything else is a test of quality, which the
# validations of a run are not, since a sweep may have chosen by them
FACTS = ("latency", "size", "training", "validation")


def is_fact(task: str) -> bool:
    """Return whether a task has figures alone, which are shown and not tested."""
    return task.partition(" ")[0] in FACTS  # "latency 8" is one, a file named latency.jsonl is not


def latest(results: Iterable[Result]) -> tuple[list[Result], int]:
    """Return the last line of each name, seed, task and metric, and how many earlier ones it replaced.

    Raises:
        UserError: if a line would replace that of another model or training run, which only happens to have its name.
    """
    kept: dict[tuple, Result] = {}
    replaced = 0
    for line in results:
        key = (line.name, line.seed, line.task, line.metric)
        earlier = kept.get(key, line)
        if (earlier.model, earlier.run) != (line.model, line.run):
            what = "model" if earlier.model != line.model else "training run"
            raise UserError(
                f"Two results of {_where(line)} are called `{line.name}` and are of another {what} each: give one of "
                "them another name, or leave its file out."
            )
        replaced += key in kept
        kept[key] = line
    return list(kept.values()), replaced


def require_comparable(results: Sequence[Result]) -> None:
    """Check that lines which will stand in one table were measured on, against, and for latency by, the same.

    Raises:
        UserError: for other items, weights, references or machines.
    """
    first: dict[tuple[str, str], Result] = {}
    measured_against: dict[tuple[str, str], Result] = {}
    for line in results:
        key = (line.task, line.metric)
        one = first.setdefault(key, line)
        timed = line.task.partition(" ")[0] == "latency"
        if timed and line.machine != one.machine:
            raise _refusal(
                "were timed on different machines", one, line, lambda each: each.machine, "time both on one machine"
            )
        if timed and line.data != one.data:
            raise _refusal(
                "were timed on different work", one, line, lambda each: each.data, "time both with the same `latency`"
            )
        if is_fact(line.task):
            continue
        if line.data != one.data or line.n != one.n:
            raise _refusal(
                "were evaluated on different items",
                one,
                line,
                lambda each: f"{each.n} items, data {each.data}",
                "evaluate both on the same data, with the same settings",
            )
        if line.weights is not None and one.weights is not None and list(line.weights) != list(one.weights):
            raise _refusal(
                "count other tokens in the same items, as models with different tokenizers do",
                one,
                line,
                lambda each: f"{sum(each.weights or ()):g} tokens",
                "compare them in bits per byte",
            )
        if line.reference is not None:
            other = measured_against.setdefault(key, line)
            if line.reference != other.reference:
                raise _refusal(
                    "are measured against different references",
                    other,
                    line,
                    lambda each: each.reference,
                    "evaluate both with one `reference`",
                )


def require_known(what: str, given: str, known: Iterable[str]) -> None:
    """Check that ``given`` is one of ``known``.

    Raises:
        UserError: if it is not; it names the nearest, or some of those there are.
    """
    names = list(dict.fromkeys(known))
    if given in names:
        return
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise UserError(
        f"There is no {what} `{given}`: " + (f"did you mean `{close[0]}`?" if close else f"choose one of {shown}.")
    )


def _where(line: Result) -> str:
    return f"{line.task} ({line.metric}{'' if line.seed is None else f', seed {line.seed}'})"


def _refusal(problem: str, one: Result, other: Result, shown: Callable[[Result], Any], advice: str) -> UserError:
    names = f"`{one.name}` and `{other.name}`" if one.name != other.name else f"Two results of `{one.name}`"
    return UserError(
        f"{names} {problem} in {_where(other)}: {shown(one)}, and {shown(other)}; {advice}, or leave one out."
    )
