"""A plan, and the gradients that are needed, as text: operators of ``torch.compile`` take plain values."""

import ast
from functools import lru_cache

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
    return f"{o.divergence!r}, {numbers}, {metrics!r}, {plan.reduction!r}, {flags}"


@lru_cache(maxsize=64)
def unpack(text: str) -> Plan:
    """Read what :func:`pack` wrote; the vocabulary is 0."""
    *objective, metrics, reduction, has_teacher, want_grad, scale = ast.literal_eval(text)
    names = tuple(metrics.split(",")) if metrics else ()
    return Plan(Objective(*objective), names, 0, reduction, has_teacher, want_grad, scale)


def pack_needed(needed: NeededGradients) -> str:
    """Write the names of the gradients that are needed."""
    names = [("hidden", needed.hidden), ("weight", needed.weight), ("bias", needed.bias)]
    return ",".join([name for name, is_needed in names if is_needed])


def unpack_needed(text: str) -> NeededGradients:
    """Read what :func:`pack_needed` wrote."""
    names = text.split(",")
    return NeededGradients(*(name in names for name in NeededGradients._fields))
