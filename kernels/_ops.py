"""What the registered operators share: their namespace, and a `Plan` in pieces, since operators take plain values.

Legend: N tokens, M metrics.
"""

import torch
from torch import Tensor

from ._objective import Objective
from ._plan import Plan, working_dtype

# a copy of this folder under another name registers operators of its own
NAMESPACE = __package__.replace(".", "_")


def unpack(
    vocab: int,
    divergence: str,
    beta: float | None,
    temperature: float,
    kd_ratio: float,
    ignore_index: int,
    scale: bool,
    metrics: str,
    reduction: str,
    has_teacher: bool,
    want_grad: bool,
) -> Plan:
    objective = Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale)
    return Plan(objective, _names(metrics), vocab, reduction, has_teacher, want_grad)


def pack(plan: Plan) -> tuple:
    """Return what `unpack` puts together again, without the vocabulary, which the tensors tell."""
    o = plan.objective
    settings = (o.divergence, o.beta, float(o.temperature), float(o.kd_ratio), o.ignore_index)
    return *settings, o.scale_by_temperature_squared, ",".join(plan.metrics), plan.reduction


def _names(metrics: str) -> tuple[str, ...]:
    return tuple(metrics.split(",")) if metrics else ()


def shared_ids(student: Tensor, teacher: Tensor | None, dim: int) -> int:
    return student.shape[dim] if teacher is None else min(student.shape[dim], teacher.shape[dim])


def fake_results(
    student: Tensor, teacher: Tensor | None, n_tokens: int, metrics: str, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, sums of the metrics and number of tokens without their values."""
    shape = (n_tokens,) if reduction == "none" else ()
    return (
        student.new_empty(shape, dtype=working_dtype(student, teacher)),
        student.new_empty(len(_names(metrics)), dtype=torch.float32),
        student.new_empty((), dtype=torch.int64),
    )


def nothing(like: Tensor) -> Tensor:
    """Return what stands for a gradient that is not needed, because operators return tensors only."""
    return like.new_empty(0)


def if_wanted(tensor: Tensor, wanted: bool) -> Tensor | None:
    return tensor if wanted else None
