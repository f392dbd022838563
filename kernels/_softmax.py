"""Distillation from logits that are already there.

Legend: N tokens, V vocabulary, B batch, S sequence.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._block import (
    BlockLoss,
    Plan,
    Rows,
    answers_at_once,
    gradient_scale,
    row_blocks,
    rows_per_block,
    scaled,
    working_dtype,
)


class SoftmaxKD(torch.autograd.Function):
    """The gradient ``[N, V]`` comes with the loss, in the student's dtype; backward only scales it."""

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor | None, labels: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (0-d or ``[N]``), sums of the metrics ``[M]`` and number of valid tokens (0-d).

        Args:
            student (Tensor): ``[N, V']`` or ``[B, S, V']`` with V' >= `plan.vocab`.
            teacher (Tensor | None): the same leading shape.
            labels (Tensor | None): ``[N]`` int64, flat; None if every token is valid.
            plan (Plan): what to compute.
        """
        n_tokens = student.shape[:-1].numel()
        dtype = working_dtype(student, teacher)
        rows = Rows.zeros(n_tokens, plan, dtype, student.device)
        valid = None if labels is None else labels != plan.objective.ignore_index
        count = torch.full((), n_tokens, device=student.device) if valid is None else valid.sum()

        grad = grad_rows = None
        if plan.want_grad:
            grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
            grad[..., plan.vocab :] = 0
            grad_rows = grad.view(n_tokens, student.shape[-1])[:, : plan.vocab]
        max_rows = min(n_tokens, rows_per_block(plan.vocab, student.device))
        block_loss = BlockLoss(plan, max_rows, dtype, student.device)
        start = 0
        for s, t in _segments(student, teacher):
            stop = start + s.shape[0]
            _segment(
                block_loss,
                s[:, : plan.vocab],
                None if t is None else t[:, : plan.vocab],
                None if labels is None else labels[start:stop],
                None if valid is None else valid[start:stop],
                None if grad_rows is None else grad_rows[start:stop],
                Rows(rows.loss[start:stop], rows.metrics[:, start:stop]),
            )
            start = stop

        loss, metrics = rows.reduce(plan.reduction, count)
        ctx.plan, ctx.count = plan, count
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(metrics, count)
        ctx.set_materialize_grads(False)
        return loss, metrics, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        if grad is None or grad_loss is None:
            return None, None, None, None
        scale = gradient_scale(grad_loss, ctx.plan.reduction, ctx.count)
        # A second [N, V] tensor is needed only if this graph will be walked again.
        rows = grad.view(-1, grad.shape[-1])
        out = scaled(rows, scale, grad.dtype, in_place=not _graph_is_kept())
        return out.view(grad.shape), None, None, None


def _graph_is_kept() -> bool:
    """Whether this backward was asked to retain the graph; True where PyTorch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def _segments(student: Tensor, teacher: Tensor | None):
    """Pairs of 2-D views ``[n, V]`` that cover the tokens in order; neither model's logits are copied."""
    tensors = (student, teacher)
    try:
        views = [None if t is None else t.view(-1, t.shape[-1]) for t in tensors]
    except RuntimeError:  # [B, S, V] cut along S: one sequence at a time
        views = [[None] * len(student) if t is None else t.unbind(0) for t in tensors]
        yield from zip(*views, strict=True)
    else:
        yield tuple(views)


def _segment(
    block_loss: BlockLoss,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    grad: Tensor | None,
    rows: Rows,
) -> None:
    """Fill `rows` and `grad` for one 2-D segment: ``[n, V]``, labels and valid ``[n]``."""
    index = None  # the rows to visit; where asking for it would wait, all of them, and masks instead
    if valid is not None and answers_at_once(student.device):
        if not valid.all():
            index = valid.nonzero().squeeze(-1)
            if grad is not None:
                grad[~valid] = 0
        valid = None
    if valid is not None:
        labels = labels.where(valid, 0)
    for block in row_blocks(len(student) if index is None else len(index), student.shape[1], student.device):
        pick = block if index is None else index[block]
        out = None
        if grad is not None:
            out = grad[block] if index is None else grad.new_empty(len(pick), grad.shape[1])
        loss, metrics = block_loss(
            student[pick],
            None if teacher is None else teacher[pick],
            None if labels is None else labels[pick],
            out,
        )
        if valid is not None:
            keep = valid[block]
            loss = loss.where(keep, 0)
            metrics = [metric.where(keep, 0) for metric in metrics]
            if out is not None:
                out.masked_fill_(~keep.unsqueeze(-1), 0)
        rows.loss[pick] = loss
        for into, metric in zip(rows.metrics, metrics, strict=True):
            into[pick] = metric.to(into.dtype)
        if out is not None and index is not None:
            grad[pick] = out
