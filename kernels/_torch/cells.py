r"""The objective against a teacher of which some ids are stored: divergences of k + 1 cells.

The stored ids K of a token are cells of their own, all others are one cell, the rest R. With z = s/T the scaled student
logits and q = softmax(z), the student's cells are :math:`Q_c = q_c` and :math:`Q_R = \sum_{j \notin K} q_j`, which is
summed: as 1 - Σ Q_c a small one would be rounding. The teacher's are :math:`P_c \propto \exp(\ell_c/T)` of its
log-probabilities, and :math:`P_R \propto \exp(t)` of the `tail` t.

Any divergence of the cells gives the gradient g ``[n, k + 1]`` by the cells' logits. That by the logits is

.. math:: \partial D/\partial z_j = g_j \;(j \in K), \qquad \partial D/\partial z_j = g_R\, w_j \;(j \in R)

with :math:`w_j = q_j/Q_R`, the softmax of the rest alone. It is made of the rest's own largest logit, so that it is
right where all of Q_R is too small for a floating-point number.

Legend: n rows of a block, V vocabulary, k stored ids, m = k + 1 cells.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._plan import Plan
from .._teachers import SAMPLED, Cells
from . import metrics
from .block import LOG2_E, known
from .divergences import Distributions, Softmax, divergence


class Coarse(NamedTuple):
    """Hold the student at one temperature, in cells and within the rest.

    Attributes:
        cells (Softmax): of the m cells; its logits are relative to `largest`, over T.
        rest (Tensor): ``[n, V + 1]``, exp((s - max_R s)/T) of the ids of the rest, 0 elsewhere.
        total (Tensor): ``[n, 1]``, Σ rest; 0 where no id is left.
        largest (Tensor): ``[n, 1]``, the row's largest logit.
        entropy (Tensor | None): ``[n]``, of w, if it was asked for.
    """

    cells: Softmax
    rest: Tensor
    total: Tensor
    largest: Tensor
    entropy: Tensor | None


class CellsBlockLoss:
    """Compute blocks of up to `max_rows` rows against stored ids, each in the same memory.

    Args:
        plan (Plan): what to compute.
        max_rows (int): the largest block that will come.
        dtype (torch.dtype): working dtype, fp32 or fp64.
        device (torch.device): of the logits.
        factor (float): multiplies every gradient.
    """

    def __init__(
        self, plan: Plan, max_rows: int, dtype: torch.dtype, device: torch.device, factor: float = 1.0
    ) -> None:
        self.plan, self._factor, self._dtype = plan, factor, dtype
        objective, wanted = plan.objective, set(plan.metrics)
        self._has_kd, self._has_ce = objective.kd_ratio > 0.0, objective.kd_ratio < 1.0
        self._kd_value = self._has_kd or "kd_loss" in wanted
        self._entropy = "student_entropy" in wanted
        # what has to be known at T = 1
        self._teacher_at_1 = bool(wanted & {"kl_cells", "acceptance_rate_cells", "teacher_class_loss_cells"})
        self._student_at_1 = self._has_ce or self._teacher_at_1 or self._entropy or "class_loss" in wanted
        self._shared = self._kd_value and objective.temperature == 1.0
        separate = self._student_at_1 and not self._shared
        # the rest at T, the rest at T = 1, scratch for its entropy; an id in a column behind the vocabulary is padding
        counted = self._kd_value, separate, self._entropy
        self._work = torch.empty(max(1, sum(counted)), max_rows, plan.vocab + 1, dtype=dtype, device=device)

    def release(self) -> None:
        """Free the memory; this one computes no more."""
        del self._work

    def __call__(
        self,
        student: Tensor,
        teacher: Cells,
        labels: Tensor,
        grad_out: Tensor | None,
        row_scale: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute one block.

        Args:
            student (Tensor): logits ``[n, V]``, any floating dtype and strides.
            teacher (Cells): ids and log-probabilities ``[n, k]``; the rest ``[n]``.
            labels (Tensor): ``[n]`` int64 in [0, V).
            grad_out (Tensor | None): ``[n, V]``, receives the gradient of each row's loss; may be `student`.
            row_scale (Tensor | None): ``[n, 1]``, multiplies each row's gradient.

        Returns:
            tuple[Tensor, list[Tensor]]: loss ``[n]`` and one ``[n]`` for each of the plan's metrics.
        """
        plan, objective, vocab = self.plan, self.plan.objective, student.shape[-1]
        work = list(self._work[:, : len(student)].unbind())
        scratch = work.pop() if self._entropy else None
        ids = _columns(teacher.ids, vocab)
        agreement = None
        if "top1_agreement" in plan.metrics:
            of_student = metrics.first_argmax(work[0][:, :vocab].copy_(student))
            agreement = of_student == _likeliest(teacher.log_probs, ids, vocab)

        loss = kd_loss = kl = at_t = at_1 = None
        slope_t = slope_1 = None  # gradients by the cells' logits [n, m]
        if self._kd_value:
            entropy_scratch = scratch if self._shared else None
            at_t = coarse(student, ids, objective.temperature, work[0], entropy_scratch)
            of_teacher = self._teacher(teacher, ids, objective.temperature, vocab, teacher.tail)
            wanted = plan.want_grad and self._has_kd
            kd_loss, slope_t = self._divergence(Distributions(of_teacher, at_t.cells), teacher, wanted)
            if self._shared and objective.computed_divergence == "forward_kl":
                kl = kd_loss.clone()
            kd_loss.mul_(objective.divergence_scale)
            if self._has_kd:
                loss = kd_loss * objective.kd_ratio
                factor = self._factor * objective.kd_ratio * objective.divergence_scale / objective.temperature
                slope_t = None if slope_t is None else slope_t.mul_(factor)

        if self._student_at_1:
            at_1 = at_t if self._shared else coarse(student, ids, 1.0, work[-1], scratch)
        class_loss = None
        if self._has_ce or "class_loss" in plan.metrics:
            class_loss = _cross_entropy(known(at_1), student, labels)
        if self._has_ce:
            class_loss, weight = known(class_loss), 1.0 - objective.kd_ratio
            loss = class_loss * weight if loss is None else loss.add(class_loss, alpha=weight)
            slope_1 = known(at_1).cells.prob * (weight * self._factor) if plan.want_grad else None

        watched = self._at_1(teacher, ids, labels, vocab, at_1, kl)
        watched |= {
            "class_loss": lambda: known(class_loss),
            "kd_loss": lambda: known(kd_loss),
            "top1_agreement": lambda: known(agreement),
            "teacher_entropy": lambda: known(teacher.entropy),
        }
        found = [watched[name]() for name in plan.metrics]
        # grad_out may be the student's own rows, so that it is written last
        if grad_out is not None:
            slopes = (at_t, slope_t), (at_1, slope_1)
            grad = _fine([(known(at), slope) for at, slope in slopes if slope is not None], ids)
            if self._has_ce:
                rows = torch.arange(len(labels), device=labels.device)
                grad[rows, labels] -= (1.0 - objective.kd_ratio) * self._factor
            grad_out.copy_((grad if row_scale is None else grad.mul_(row_scale))[:, :vocab])
        return known(loss), found

    def _divergence(self, dist: Distributions, teacher: Cells, want_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Compute D(P, Q) ``[n]`` and its gradient by the cells' logits ``[n, m]``.

        Of drawn ids it is Σ P·(-log Q) less the stored entropy of the whole teacher: the expected value of the first is
        the cross-entropy of whole distributions, whatever is drawn.
        """
        objective = self.plan.objective
        if self.plan.teacher_kind != SAMPLED:
            r, x, *grad = (torch.empty_like(dist.p) for _ in range(2 + want_grad))
            out = grad[0] if want_grad else None
            return divergence(objective.computed_divergence, objective.beta, dist, r, x, out), out
        mean = (dist.p * dist.student.u.where(dist.p != 0.0, 0.0)).sum(-1)
        value = dist.student.total.log().squeeze(-1) - mean
        if teacher.entropy is not None:
            value = value - teacher.entropy.to(self._dtype)
        return value, dist.q - dist.p if want_grad else None

    def _teacher(self, teacher: Cells, ids: Tensor, temperature: float, vocab: int, tail: Tensor | None) -> Softmax:
        """Compute the teacher's cells at a temperature, of which `tail` is."""
        rest = torch.full((len(ids), 1), -torch.inf, dtype=self._dtype, device=ids.device)
        if tail is not None:
            rest = tail.to(self._dtype).unsqueeze(-1)
            if (
                ids.shape[-1] >= vocab
            ):  # what is left where all ids are stored scores ids that the student does not have
                rest = rest.where((ids < vocab).sum(-1, keepdim=True) < vocab, -torch.inf)
        stored = (teacher.log_probs.to(self._dtype) / temperature).masked_fill(ids == vocab, -torch.inf)
        u = torch.cat([stored, rest], -1)
        u.sub_(u.amax(-1, keepdim=True))
        prob = u.exp()
        total = prob.sum(-1, keepdim=True)
        return Softmax(u, prob.div_(total), total)

    def _at_1(
        self, teacher: Cells, ids: Tensor, labels: Tensor, vocab: int, at_1: Coarse | None, kl: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        """Return by name what computes a metric of the cells at T = 1 ``[n]``; `kl` is known where it was the loss."""
        if at_1 is None:
            return {}
        watched: dict[str, Callable[[], Tensor]] = {"student_entropy": lambda: _entropy(at_1)}
        if not self._teacher_at_1:
            return watched
        tail = teacher.tail if self.plan.objective.temperature == 1.0 else teacher.tail_at_1
        dist = Distributions(self._teacher(teacher, ids, 1.0, vocab, tail), at_1.cells)
        r, x = torch.empty_like(dist.p), torch.empty_like(dist.p)
        return watched | {
            "kl_cells": lambda: metrics.kl(dist, r, x) if kl is None else kl,
            "acceptance_rate_cells": lambda: metrics.acceptance_rate(dist, x),
            "teacher_class_loss_cells": lambda: _cell_loss(dist.teacher, ids, labels),
        }


def coarse(logits: Tensor, ids: Tensor, temperature: float, rest: Tensor, scratch: Tensor | None) -> Coarse:
    """Compute the student's cells at a temperature.

    Args:
        logits (Tensor): ``[n, V]``.
        ids (Tensor): ``[n, k]`` int64, V for padding.
        temperature (float): T.
        rest (Tensor): ``[n, V + 1]``, where that of the result is written.
        scratch (Tensor | None): ``[n, V + 1]``, to compute the rest's entropy with; None for none.
    """
    vocab = logits.shape[-1]
    rest[:, :vocab].copy_(logits)
    rest[:, vocab:] = -torch.inf
    stored = rest.gather(-1, ids)
    rest.scatter_(-1, ids, -torch.inf)
    # finite where no id is left, so that their difference is -inf and no NaN
    top = rest.amax(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).min)
    rest.sub_(top)
    if temperature != 1.0:
        rest.div_(temperature)
    if scratch is not None:
        scratch.copy_(rest)
    rest.mul_(LOG2_E).exp2_()  # on a CPU half the time of exp
    total = rest.sum(-1, keepdim=True)
    entropy = None
    if scratch is not None:
        mean = scratch.clamp_(min=torch.finfo(rest.dtype).min).mul_(rest).sum(-1, keepdim=True) / total
        entropy = (total.log() - mean).where(total != 0.0, 0.0).squeeze(-1)

    u = torch.cat([stored, top], -1)
    largest = u.amax(-1, keepdim=True)
    u.sub_(largest).div_(temperature)
    prob = u.exp()
    # the rest's by a product: in a logarithm of -25, its mass of 1e-11 would lose the seventh digit
    prob[:, -1:] *= total
    u[:, -1:] += total.log()
    mass = prob.sum(-1, keepdim=True)
    return Coarse(Softmax(u, prob.div_(mass), mass), rest, total, largest, entropy)


def _fine(parts: list[tuple[Coarse, Tensor]], ids: Tensor) -> Tensor:
    """Compute the gradient by the logits ``[n, V + 1]`` of those by the cells' logits ``[n, m]``, in the first rest."""
    if len(parts) == 2 and parts[0][0] is parts[1][0]:
        parts = [(parts[0][0], parts[0][1] + parts[1][1])]
    grad = stored = None
    for at, slope in parts:
        share = (slope[:, -1:] / at.total).where(at.total != 0.0, 0.0)
        grad = at.rest.mul_(share) if grad is None else grad.addcmul_(at.rest, share)
        stored = slope[:, :-1] if stored is None else stored + slope[:, :-1]
    return known(grad).scatter_(-1, ids, known(stored))


def _columns(ids: Tensor, vocab: int) -> Tensor:
    """Return ids as columns ``[n, k]`` int64: V where there is none, and for those that the student does not have."""
    ids = ids.long()
    return ids.where((ids >= 0) & (ids < vocab), vocab)


def _likeliest(log_probs: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """Return the stored id with the largest log-probability ``[n]``, the first one of ties; V where none is stored."""
    log_probs = log_probs.masked_fill(ids == vocab, -torch.inf)
    return ids.where(log_probs == log_probs.amax(-1, keepdim=True), vocab).amin(-1)


def _cross_entropy(at_1: Coarse, logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log q_y ``[n]`` at T = 1."""
    of_label = logits.gather(-1, labels.unsqueeze(-1)).to(at_1.largest.dtype) - at_1.largest
    return (at_1.cells.total.log() - of_label).squeeze(-1)


def _cell_loss(cells: Softmax, ids: Tensor, labels: Tensor) -> Tensor:
    """Compute -log P of the cell that holds the label ``[n]``."""
    hit = ids == labels.unsqueeze(-1)
    cell = hit.long().argmax(-1, keepdim=True).where(hit.any(-1, keepdim=True), ids.shape[-1])
    return (cells.total.log() - cells.u.gather(-1, cell)).squeeze(-1)


def _entropy(at_1: Coarse) -> Tensor:
    """Compute the entropy of all ids ``[n]``: that of the cells, and that within the rest times its mass."""
    of_cells = metrics.entropy(at_1.cells, torch.empty_like(at_1.cells.u))
    return of_cells + at_1.cells.prob[:, -1] * known(at_1.entropy)
