r"""The objective against a teacher of which some ids are stored: divergences of k + 1 cells.

The stored ids K of a token are cells of their own, all others are one cell, the rest R. With z = s/T the scaled student
logits and q = softmax(z), the student's cells are :math:`Q_c = q_c` and :math:`Q_R = \sum_{j \notin K} q_j`, which is
summed: as 1 - Σ Q_c a small one would be rounding. The teacher's are :math:`P_c \propto \exp(\ell_c/T)` of its
log-probabilities, and :math:`P_R \propto \exp(t)` of the `tail` t.

Any divergence of the cells gives the gradient g ``[n, k + 1]`` by the cells' logits. That by the logits is

.. math:: \partial D/\partial z_j = g_j \;(j \in K), \qquad \partial D/\partial z_j = g_R\, w_j \;(j \in R)

with :math:`w_j = q_j/Q_R`, the softmax of the rest alone. It is made of the rest's own largest logit, so that it is
right where all of Q_R is too small for a floating-point number.

The formulas are in :class:`CellsLoss`, k + 1 wide. What is V wide each backend reads and writes by two methods.

Legend: n rows of a block, V vocabulary, k stored ids, m = k + 1 cells.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .._plan import Plan
from .._teachers import SAMPLED, Cells
from . import metrics
from .block import known
from .coarse import Coarse, Gathered, Gradient, coarse, likeliest, share_of, stored_logits, sum_rest
from .divergences import Distributions, Softmax, divergence


class CellsLoss(ABC):
    """Compute blocks of rows against stored ids.

    Args:
        plan (Plan): what to compute.
        dtype (torch.dtype): working dtype, fp32 or fp64.
        scale (Tensor | float): 0-d, multiplies the gradient of blocks that come without a `row_scale`.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype, scale: Tensor | float) -> None:
        self.plan, self._dtype, self._scale = plan, dtype, scale
        objective, wanted = plan.objective, set(plan.metrics)
        self._has_kd, self._has_ce = objective.kd_ratio > 0.0, objective.kd_ratio < 1.0
        self._kd_value = self._has_kd or "kd_loss" in wanted
        self._class_loss = self._has_ce or "class_loss" in wanted
        self._agreement = "top1_agreement" in wanted
        self._entropy = "student_entropy" in wanted
        # what has to be known at T = 1
        self._teacher_at_1 = bool(wanted & {"kl_cells", "acceptance_rate_cells", "teacher_class_loss_cells"})
        self._student_at_1 = self._class_loss or self._teacher_at_1 or self._entropy
        self._shared = self._kd_value and objective.temperature == 1.0
        self._separate = self._student_at_1 and not self._shared

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
            row_scale (Tensor | None): ``[n, 1]``, multiplies each row's gradient, in the place of `scale`.

        Returns:
            tuple[Tensor, list[Tensor]]: loss ``[n]`` and one ``[n]`` for each of the plan's metrics.
        """
        plan, objective, vocab = self.plan, self.plan.objective, student.shape[-1]
        ids = _columns(teacher.ids, vocab)
        gathered = self._read(student, ids, labels)

        loss = kd_loss = kl = at_t = at_1 = None
        slope_t = slope_1 = None  # gradients by the cells' logits [n, m]
        if self._kd_value:
            at_t = coarse(gathered.stored, known(gathered.at_t), objective.temperature)
            kd_loss, slope_t = self._divergence(teacher, ids, vocab, at_t.cells, plan.want_grad and self._has_kd)
            if self._shared and objective.computed_divergence == "forward_kl":
                kl = kd_loss.clone()
            kd_loss.mul_(objective.divergence_scale)
            if self._has_kd:
                loss = kd_loss * objective.kd_ratio
                factor = objective.kd_ratio * objective.divergence_scale / objective.temperature
                slope_t = None if slope_t is None else slope_t.mul_(factor)

        if self._student_at_1:
            at_1 = at_t if self._shared else coarse(gathered.stored, known(gathered.at_1), 1.0)
        class_loss = None
        if self._class_loss:
            class_loss = _cross_entropy(known(at_1), known(gathered.label))
        if self._has_ce:
            class_loss, weight = known(class_loss), 1.0 - objective.kd_ratio
            loss = class_loss * weight if loss is None else loss.add(class_loss, alpha=weight)
            slope_1 = known(at_1).cells.prob * weight if plan.want_grad else None
            if self._shared and slope_1 is not None:
                slope_t, slope_1 = slope_1 if slope_t is None else slope_t.add_(slope_1), None

        watched = self._at_1(teacher, ids, labels, vocab, at_1, kl)
        watched |= {
            "class_loss": lambda: known(class_loss),
            "kd_loss": lambda: known(kd_loss),
            "top1_agreement": lambda: known(gathered.first) == likeliest(teacher.log_probs, ids, vocab),
            "teacher_entropy": lambda: known(teacher.entropy),
        }
        found = [watched[name]() for name in plan.metrics]
        del watched  # and with it the teacher's cells at T = 1
        # grad_out may be the student's own rows, so that it is written last
        if grad_out is not None:
            scale = self._scale if row_scale is None else row_scale
            gradient = self._gradient(at_t, slope_t, at_1, slope_1, scale)
            self._write(student, gathered, gradient, ids, labels, grad_out)
        return known(loss), found

    @abstractmethod
    def release(self) -> None:
        """Free what blocks share; this one computes no more."""

    @abstractmethod
    def _read(self, student: Tensor, ids: Tensor, labels: Tensor) -> Gathered:
        """Read what the cells need of the logits.

        Args:
            student (Tensor): ``[n, V]``.
            ids (Tensor): ``[n, k]`` int64, V for padding.
            labels (Tensor): ``[n]`` int64.
        """

    @abstractmethod
    def _write(
        self, student: Tensor, gathered: Gathered, gradient: Gradient, ids: Tensor, labels: Tensor, grad_out: Tensor
    ) -> None:
        """Write the gradient ``[n, V]`` that `gradient` stands for; the arguments are those of ``_read``."""

    def _gradient(
        self,
        at_t: Coarse | None,
        slope_t: Tensor | None,
        at_1: Coarse | None,
        slope_1: Tensor | None,
        scale: Tensor | float,
    ) -> Gradient:
        """Return what the gradients by the cells' logits ``[n, m]``, beside their cells, make of those by all."""
        slopes = [slope for slope in (slope_t, slope_1) if slope is not None]
        stored = slopes[0][:, :-1] if len(slopes) == 1 else slopes[0][:, :-1] + slopes[1][:, :-1]
        share_t = None if slope_t is None else share_of(known(at_t).rest, slope_t)
        share_1 = None if slope_1 is None else share_of(known(at_1).rest, slope_1)
        label = stored.new_full((len(stored), 1), 1.0 - self.plan.objective.kd_ratio) if self._has_ce else None
        return Gradient(stored * scale, *(None if part is None else part * scale for part in (share_t, share_1, label)))

    def _divergence(
        self, teacher: Cells, ids: Tensor, vocab: int, student: Softmax, want_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute D(P, Q) ``[n]`` at T and its gradient by the cells' logits ``[n, m]``.

        Of drawn ids it is Σ P·(-log Q) less the stored entropy of the whole teacher: the expected value of the first is
        the cross-entropy of whole distributions, whatever is drawn.
        """
        objective = self.plan.objective
        dist = Distributions(self._teacher(teacher, ids, objective.temperature, vocab, teacher.tail), student)
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
            # what is left where all ids are stored scores ids that the student does not have
            if ids.shape[-1] >= vocab:
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
        # scratch is made when it is needed, so that no two metrics hold some at a time
        return watched | {
            "kl_cells": lambda: (
                metrics.kl(dist, torch.empty_like(dist.p), torch.empty_like(dist.p)) if kl is None else kl
            ),
            "acceptance_rate_cells": lambda: metrics.acceptance_rate(dist, torch.empty_like(dist.p)),
            "teacher_class_loss_cells": lambda: _cell_loss(dist.teacher, ids, labels),
        }


class CellsBlockLoss(CellsLoss):
    """Compute blocks of up to `max_rows` rows against stored ids, each in the same memory.

    Args:
        plan (Plan): what to compute.
        max_rows (int): the largest block that will come.
        dtype (torch.dtype): working dtype, fp32 or fp64.
        device (torch.device): of the logits.
        factor (float): multiplies the gradient of blocks that come without a `row_scale`.
    """

    def __init__(
        self, plan: Plan, max_rows: int, dtype: torch.dtype, device: torch.device, factor: float = 1.0
    ) -> None:
        super().__init__(plan, dtype, factor)
        # the rest at T, the rest at T = 1, scratch for its entropy; an id in a column behind the vocabulary is padding
        counted = self._kd_value, self._separate, self._entropy
        self._work = torch.empty(max(1, sum(counted)), max_rows, plan.vocab + 1, dtype=dtype, device=device)

    def release(self) -> None:
        """Free the workspace."""
        del self._work

    def _read(self, student: Tensor, ids: Tensor, labels: Tensor) -> Gathered:
        """Leave the rest's exponentials in the workspace for ``_write``."""
        temperature, vocab = self.plan.objective.temperature, student.shape[-1]
        work = list(self._work[:, : len(student)].unbind())
        scratch = work.pop() if self._entropy else None
        first = metrics.first_argmax(work[0][:, :vocab].copy_(student)) if self._agreement else None
        at_t = at_1 = None
        if self._kd_value:
            at_t = sum_rest(student, ids, temperature, work[0], scratch if self._shared else None)
        if self._separate:
            at_1 = sum_rest(student, ids, 1.0, work[-1], scratch)
        label = student.gather(-1, labels.unsqueeze(-1)).to(self._dtype) if self._class_loss else None
        return Gathered(stored_logits(student, ids, self._dtype), label, first, at_t, at_1)

    def _write(
        self, student: Tensor, gathered: Gathered, gradient: Gradient, ids: Tensor, labels: Tensor, grad_out: Tensor
    ) -> None:
        """Scale the exponentials that ``_read`` has left, and copy them."""
        grad = None if gradient.share_t is None else self._work[0, : len(ids)].mul_(gradient.share_t)
        if gradient.share_1 is not None:
            at_1 = self._work[int(self._kd_value), : len(ids)]
            grad = at_1.mul_(gradient.share_1) if grad is None else grad.addcmul_(at_1, gradient.share_1)
        grad = known(grad).scatter_(-1, ids, gradient.stored)
        if gradient.label is not None:
            grad[torch.arange(len(labels), device=labels.device), labels] -= gradient.label.squeeze(-1)
        grad_out.copy_(grad[:, : student.shape[-1]])


def _columns(ids: Tensor, vocab: int) -> Tensor:
    """Return ids as columns ``[n, k]`` int64: V where there is none, and for those that the student does not have."""
    ids = ids.long()
    return ids.where((ids >= 0) & (ids < vocab), vocab)


def _cross_entropy(at_1: Coarse, label: Tensor) -> Tensor:
    """Compute -log q_y ``[n]`` at T = 1 from the label's logit ``[n, 1]``."""
    return (at_1.cells.total.log() - (label - at_1.largest)).squeeze(-1)


def _cell_loss(cells: Softmax, ids: Tensor, labels: Tensor) -> Tensor:
    """Compute -log P of the cell that holds the label ``[n]``."""
    hit = ids == labels.unsqueeze(-1)
    cell = hit.long().argmax(-1, keepdim=True).where(hit.any(-1, keepdim=True), ids.shape[-1])
    return (cells.total.log() - cells.u.gather(-1, cell)).squeeze(-1)


def _entropy(at_1: Coarse) -> Tensor:
    """Compute the entropy of all ids ``[n]``: that of the cells, and that within the rest times its mass."""
    of_cells = metrics.entropy(at_1.cells, torch.empty_like(at_1.cells.u))
    return of_cells + at_1.cells.prob[:, -1] * known(at_1.rest.entropy)
