"""The objective on a few rows at a time: value, gradient and metrics from one visit to the logits.

A block is small enough for its fp32 temporaries to stay in the cache of a CPU; they are allocated once per call, or
left by the last one, and used for every block.

Legend: n rows of a block, V vocabulary, N tokens.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

from .._plan import Plan
from . import metrics
from .divergences import KULLBACK_LEIBLER, Distributions, Softmax, divergence, kl_from_exponentials
from .workspaces import Workspaces

LOG2_E = math.log2(math.e)
_T = TypeVar("_T")


class BlockLoss:
    """Compute blocks of up to `max_rows` rows, each in the same memory.

    Args:
        plan (Plan): what to compute.
        max_rows (int): the largest block that will come.
        dtype (torch.dtype): working dtype, fp32 or fp64.
        device (torch.device): of the logits.
        factor (float): multiplies every gradient.
        workspaces (Workspaces | None): where its memory is from, and what it is given back to by :meth:`release`.
    """

    def __init__(
        self,
        plan: Plan,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        factor: float = 1.0,
        workspaces: Workspaces | None = None,
    ) -> None:
        self.plan, self._factor, self._workspaces = plan, factor, workspaces
        objective, wanted = plan.objective, set(plan.metrics)
        self._divergence = objective.computed_divergence
        self._has_kd = objective.kd_ratio > 0.0
        self._has_ce = objective.kd_ratio < 1.0
        self._kd_value = self._has_kd or "kd_loss" in wanted
        # what has to be known at T = 1
        both = bool(wanted & {"kl", "acceptance_rate"}) or ("top1_agreement" in wanted and not self._has_kd)
        self._needs_student = self._has_ce or both or bool(wanted & {"class_loss", "student_entropy"})
        self._needs_teacher = both or bool(wanted & {"teacher_class_loss", "teacher_entropy"})
        # the loss alone is a sum over exponentials, and needs no probability
        self._undivided = not plan.want_grad and not wanted and objective.divergence in KULLBACK_LEIBLER
        # of the student: logits, probabilities and scratch; the same of the teacher; the gradient
        count = 3 + 3 * plan.has_teacher + plan.want_grad
        elements = count * max_rows * plan.vocab
        take = torch.empty if workspaces is None else workspaces.take
        self._memory = take(elements, dtype=dtype, device=device)
        self._work = self._memory[:elements].view(count, max_rows, plan.vocab).unbind()

    def release(self) -> None:
        """Hand the memory to the next call; this one computes no more."""
        memory = self._memory
        del self._memory, self._work
        if self._workspaces is not None:
            self._workspaces.give_back(memory)

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        grad_out: Tensor | None,
        row_scale: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute one block.

        Args:
            student (Tensor): logits ``[n, V]``, any floating dtype and strides.
            teacher (Tensor | None): logits ``[n, V]``.
            labels (Tensor | None): ``[n]`` int64 in [0, V).
            grad_out (Tensor | None): ``[n, V]``, receives the gradient of each row's loss; may be `student`.
            row_scale (Tensor | None): ``[n, 1]``, multiplies each row's gradient.

        Returns:
            tuple[Tensor, list[Tensor]]: loss ``[n]`` and one ``[n]`` for each of the plan's metrics.
        """
        plan, objective = self.plan, self.plan.objective
        u_q, q, x, *others = (buffer[: student.shape[0]] for buffer in self._work)
        grad = others.pop() if plan.want_grad else None
        u_p, p, r = others if others else (None, None, None)
        temperature, at_temperature_1 = objective.temperature, objective.temperature == 1.0

        loss = kd_loss = kl = of_student = of_teacher = None
        if self._kd_value:
            of_student = _softmax(student, temperature, u_q, q, divide=not self._undivided)
            of_teacher = _softmax(known(teacher), temperature, known(u_p), known(p), divide=not self._undivided)
            kd_grad = grad if self._has_kd else None
            dist = Distributions(of_teacher, of_student)
            if self._undivided:
                kd_loss = kl_from_exponentials(objective.divergence, objective.beta, dist, known(r), x)
            else:
                kd_loss = divergence(self._divergence, objective.beta, dist, known(r), x, kd_grad)
            kl = kd_loss.clone() if at_temperature_1 and self._divergence == "forward_kl" else None
            kd_loss.mul_(objective.divergence_scale)
            if self._has_kd:
                loss = kd_loss * objective.kd_ratio
                factor = self._factor * objective.kd_ratio * objective.divergence_scale / temperature
                if kd_grad is not None and factor != 1.0:
                    kd_grad.mul_(factor)

        fresh = self._kd_value and at_temperature_1
        if self._needs_student and not fresh:
            of_student = self._at_temperature_1(student, of_student, u_q, q)
        if self._needs_teacher and not fresh:
            of_teacher = self._at_temperature_1(known(teacher), of_teacher, known(u_p), known(p))
        dist = None if of_teacher is None else Distributions(of_teacher, known(of_student))

        class_loss = None
        if self._has_ce or "class_loss" in plan.metrics:
            class_loss = _cross_entropy(known(of_student), known(labels))
        if self._has_ce:
            class_loss, weight = known(class_loss), 1.0 - objective.kd_ratio
            loss = class_loss * weight if loss is None else loss.add(class_loss, alpha=weight)
            if grad is not None:
                weight *= self._factor
                if self._has_kd:
                    grad.add_(q, alpha=weight)
                else:
                    torch.mul(q, weight, out=grad)
                ids = known(labels)
                grad[torch.arange(len(ids), device=ids.device), ids] -= weight

        values = {
            "class_loss": lambda: class_loss,
            "teacher_class_loss": lambda: _cross_entropy(known(of_teacher), known(labels)),
            "kd_loss": lambda: kd_loss,
            "kl": lambda: kl if kl is not None else metrics.kl(known(dist), known(r), x),
            "top1_agreement": lambda: metrics.top1_agreement(known(dist)),
            "student_entropy": lambda: metrics.entropy(known(of_student), x),
            "teacher_entropy": lambda: metrics.entropy(known(of_teacher), x),
            "acceptance_rate": lambda: metrics.acceptance_rate(known(dist), x),
        }
        watched = [values[name]() for name in plan.metrics]
        # grad_out may be the student's own rows, so that it is written last
        if grad_out is not None:
            grad = known(grad)
            grad_out.copy_(grad if row_scale is None else grad.mul_(row_scale))
        return known(loss), watched

    def _at_temperature_1(self, logits: Tensor, other: Softmax | None, u: Tensor, prob: Tensor) -> Softmax:
        """Compute the softmax at T = 1, from the logits that `other`, that at T, has left in `u`, if there is one."""
        if other is None:
            return _softmax(logits, 1.0, u, prob)
        return _exponentials(u.mul_(self.plan.objective.temperature), prob)


def known(value: _T | None) -> _T:
    """Return what is there because the plan needs it."""
    assert value is not None
    return value


def _softmax(logits: Tensor, temperature: float, u: Tensor, prob: Tensor, divide: bool = True) -> Softmax:
    """Compute softmax(logits/T) ``[n, V]`` in `prob`, divided by its sum if `divide`, and its logits in `u`.

    ``torch.softmax`` would keep its totals to itself, and take another logarithm of them to compute: the divergences
    need the very total that the probabilities were divided by.
    """
    u.copy_(logits)
    u.sub_(u.amax(-1, keepdim=True))
    if temperature != 1.0:
        u.div_(temperature)
    return _exponentials(u, prob, divide)


def _exponentials(u: Tensor, prob: Tensor, divide: bool = True) -> Softmax:
    """Compute exp(u) in `prob`, divided by its sum if `divide`."""
    torch.exp2(torch.mul(u, LOG2_E, out=prob), out=prob)  # on a CPU half the time of exp
    total = prob.sum(-1, keepdim=True)
    if divide:
        prob.div_(total)
    return Softmax(u, prob, total)


def _cross_entropy(dist: Softmax, labels: Tensor) -> Tensor:
    """Compute -log softmax(u)_y ``[n]``."""
    return (dist.total.log() - dist.u.gather(-1, labels.unsqueeze(-1))).squeeze(-1)
