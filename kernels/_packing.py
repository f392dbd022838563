"""A plan, and the gradients that are needed, as text: operators of ``torch.compile`` take plain values."""

import ast
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from ._linear import NeededGradients
from ._objective import Objective
from ._plan import Plan


def pack(plan: Plan) -> str:
    """Write a plan as text, without the vocabulary, which the tensors tell; ``torch.compile`` traces this."""
    o = plan.objective
    numbers = f"{o.beta}, {o.temperature}, {o.kd_ratio}, {o.ignore_index}, {o.scale_by_temperature_squared}"
    metrics = ",".join(plan.metrics)
    # by format strings, which make constants of floats that a graph has as its inputs
    flags = f"{plan.has_teacher}, {plan.want_grad}, {plan.scale}"
    shares = ",".join([f"{share}" for share in plan.shares])
    return f"{o.divergence!r}, {numbers}, {metrics!r}, {plan.reduction!r}, {flags}, {plan.teacher_kind!r}, {shares!r}"


@lru_cache(maxsize=64)
def unpack(text: str) -> Plan:
    """Read what :func:`pack` wrote; the vocabulary is 0."""
    *objective, metrics, reduction, has_teacher, want_grad, scale, kind, shares = ast.literal_eval(text)
    names = tuple(metrics.split(",")) if metrics else ()
    weights = tuple(float(share) for share in shares.split(",")) if shares else ()
    return Plan(Objective(*objective), names, 0, reduction, has_teacher, want_grad, scale, kind, weights)


def pack_needed(needed: NeededGradients) -> str:
    """Write the names of the gradients that are needed."""
    names = [("hidden", needed.hidden), ("weight", needed.weight), ("bias", needed.bias)]
    return ",".join([name for name, is_needed in names if is_needed])


def unpack_needed(text: str) -> NeededGradients:
    """Read what :func:`pack_needed` wrote."""
    names = text.split(",")
    return NeededGradients(*(name in names for name in NeededGradients._fields))


def pack_optional(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], str]:
    """Return the tensors that are there, and where: autograd of operators knows no list with a None in it."""
    return [t for t in tensors if t is not None], "".join(["-" if t is None else "+" for t in tensors])


def unpack_optional(tensors: Sequence[Tensor], given: str) -> list[Tensor | None]:
    """Return what :func:`pack_optional` was given."""
    rest = iter(tensors)
    return [next(rest) if mark == "+" else None for mark in given]
