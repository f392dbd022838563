"""Distillation from logits that are already there.

Legend: N tokens, V vocabulary, B batch, S sequence.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ._derivatives import anchor, on_graph_of, refuse_tangents, refuse_transforms
from ._plan import Plan, Rows, host_can_read, row_blocks, rows_per_block, working_dtype
from ._scaling import mean_factor, mean_is_inside, mean_scale, remaining_scale, retains_graph, scaled
from ._torch.block import BlockLoss
from ._torch.workspaces import WORKSPACES


class SoftmaxKD(torch.autograd.Function):
    """Compute the gradient ``[N, V]`` together with the loss, in the student's dtype, and only scale it in backward."""

    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        plan: Plan,
        backend: str,
        group: "dist.ProcessGroup | None" = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (0-d or ``[N]``), sums of the metrics ``[M]`` and number of valid tokens (0-d)."""
        loss, metrics, count, grad = softmax_forward(student, teacher, labels, plan, backend, group)
        ctx.reduction, ctx.backend, ctx.count = plan.reduction, backend, count
        with torch.enable_grad():
            ctx.inputs = anchor(student) if plan.want_grad else None
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(metrics, count)
        ctx.set_materialize_grads(False)
        return loss, metrics, count

    jvp = staticmethod(refuse_tangents)

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        refuse_transforms(grad_loss)
        (grad,) = ctx.saved_tensors
        if grad is None or grad_loss is None:
            return None, None, None, None, None, None
        with torch.no_grad():
            # a second [N, V] tensor is needed only if this graph will be walked again
            out = softmax_backward(grad, grad_loss, ctx.count, ctx.reduction, ctx.backend, in_place=not retains_graph())
        return *on_graph_of((out,), grad_loss, ctx.inputs), None, None, None, None, None


def softmax_forward(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    plan: Plan,
    backend: str,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return loss (0-d or ``[N]``), sums of the metrics ``[M]``, number of valid tokens (0-d), gradient.

    Args:
        student (Tensor): ``[N, V']`` or ``[B, S, V']`` with V' >= `plan.vocab`.
        teacher (Tensor | None): the same leading shape.
        labels (Tensor | None): ``[N]`` int64, flat; None if every token is valid.
        plan (Plan): what to compute.
        backend (str): what ``resolve_backend`` returned.
        group (dist.ProcessGroup | None): its processes hold a shard of the vocabulary each; Triton only.
    """
    n_tokens = student.shape[:-1].numel()
    valid = None if labels is None else labels != plan.objective.ignore_index
    count = torch.full((), n_tokens, device=student.device) if valid is None else valid.sum()
    grad = None
    if plan.want_grad:
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        if plan.vocab < grad.shape[-1]:
            grad[..., plan.vocab :] = 0
    inside = mean_is_inside(backend, plan.reduction, student.dtype, student.device)
    if group is not None:
        from ._triton.shards import Group, parallel_rows

        rows = parallel_rows(
            student, teacher, labels, plan, grad, mean_scale(count, inside, plan.scale), Group.of(group)
        )
    elif backend == "triton":
        from ._triton.rows import rows as triton_rows

        rows = triton_rows(student, teacher, labels, plan, grad, mean_scale(count, inside, plan.scale))
    else:
        rows = _torch_rows(student, teacher, labels, valid, plan, grad, plan.scale * mean_factor(count, inside))
    loss, metrics = rows.reduce(plan.reduction, count)
    return loss if plan.scale == 1.0 else loss * plan.scale, metrics, count, grad


def softmax_backward(
    grad: Tensor, grad_loss: Tensor, count: Tensor, reduction: str, backend: str, in_place: bool
) -> Tensor:
    """Multiply the stored gradient ``[N, V]`` or ``[B, S, V]`` by the incoming one (0-d, or ``[N]``)."""
    scale = remaining_scale(grad_loss, count, reduction, backend, grad.dtype)
    rows = grad.view(-1, grad.shape[-1])
    if backend == "triton":
        from ._triton.rows import scaled_rows

        return scaled_rows(rows, scale, in_place).view(grad.shape)
    return scaled(rows, scale, grad.dtype, in_place).view(grad.shape)


def _torch_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    plan: Plan,
    grad: Tensor | None,
    factor: float,
) -> Rows:
    """Visit all tokens in blocks of rows, and fill `grad` with `factor` times the gradient."""
    n_tokens, dtype = student.shape[:-1].numel(), working_dtype(student, teacher)
    rows = Rows.zeros(n_tokens, plan, dtype, student.device)
    grad_rows = None if grad is None else grad.view(n_tokens, student.shape[-1])[:, : plan.vocab]
    max_rows = min(n_tokens, rows_per_block(plan.vocab, student.device))
    block_loss = BlockLoss(plan, max_rows, dtype, student.device, factor, WORKSPACES)
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
    block_loss.release()
    return rows


def _segments(student: Tensor, teacher: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield pairs of 2-D views ``[n, V]`` that cover the tokens in order; neither model's logits are copied."""
    try:
        flat = student.view(-1, student.shape[-1])
        flat_teacher = None if teacher is None else teacher.view(-1, teacher.shape[-1])
    except RuntimeError:  # [B, S, V] cut along S has no flat view: one sequence at a time
        teachers = [None] * len(student) if teacher is None else teacher.unbind(0)
        yield from zip(student.unbind(0), teachers, strict=True)
    else:
        yield flat, flat_teacher


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
    index = None  # the rows to visit; all of them, with masks instead, where the host would wait for it
    if valid is not None and host_can_read(student.device):
        if not valid.all():
            index = valid.nonzero().squeeze(-1)
            if grad is not None:
                grad[~valid] = 0
        valid = None
    if labels is not None and valid is not None:
        labels = labels.where(valid, 0)
    for block in row_blocks(len(student) if index is None else len(index), student.shape[1], student.device):
        pick = block if index is None else index[block]
        out = None
        if grad is not None:
            out = grad[block] if isinstance(pick, slice) else grad.new_empty(len(pick), grad.shape[1])
        loss, metrics = block_loss(
            _rows(student, pick),
            None if teacher is None else _rows(teacher, pick),
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
        if grad is not None and out is not None and not isinstance(pick, slice):
            grad.index_copy_(0, pick, out)


def _rows(logits: Tensor, pick: "slice | Tensor") -> Tensor:
    """Return rows of ``[n, V]``: a view, or copies of those at some indices."""
    return logits[pick] if isinstance(pick, slice) else logits.index_select(0, pick)
