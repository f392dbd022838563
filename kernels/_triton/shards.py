"""Rows whose vocabulary is sharded over the processes of a group.

Legend: N tokens, V ids of this process's shard, W processes.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_label_values
from .._plan import Plan, Rows, host_can_read
from .blocks import NO_ID
from .launch import rows_of
from .shard_kernels import LABEL_LOGITS, MAXIMA
from .walk import Walk

# What the kernels are told in place of a label: one that is ignored, one that no shard holds.
_IGNORED, _NOWHERE = -2, -1


class Group(NamedTuple):
    """Reduce tensors in place over a process group, or anything like one."""

    handle: "dist.ProcessGroup"
    rank: int
    size: int

    @classmethod
    def of(cls, handle: "dist.ProcessGroup") -> "Group":
        """Return the group that `handle` stands for."""
        return cls(handle, dist.get_rank(handle), dist.get_world_size(handle))

    def reduce(self, tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        """Reduce `tensor` over the processes, in place, and return it."""
        dist.all_reduce(tensor, operation, self.handle)
        return tensor


def parallel_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    plan: Plan,
    grad_out: Tensor | None,
    row_scale: Tensor | None,
    group: Group,
) -> Rows:
    """Compute ``rows.rows`` of logits whose ids lie on the processes of ``group`` in the order of their ranks.

    One MAX and one SUM all-reduce; jsd, skewed KLs, tvd and metrics one more SUM, top-1 agreement one more MIN. None
    waits for the device, and none is larger than 36 bytes a token.

    Args:
        labels (Tensor | None): ``[N]`` int64, ids of the whole vocabulary, the same on all processes.
        plan (Plan): ``vocab`` is this shard's.
        grad_out (Tensor | None): shape of ``student``, receives this shard's gradient.

    Returns:
        Rows: the same on all processes.
    """
    n_tokens = student.shape[:-1].numel()
    if n_tokens == 0:
        return Rows.zeros(0, plan, torch.float32, student.device)
    valid = None if labels is None else labels != plan.objective.ignore_index
    # where a label lies is known after the first exchange; until then it is only ignored or not
    early = None if valid is None else torch.where(valid, _NOWHERE, _IGNORED)
    walk = Walk(student, teacher, early, plan, grad_out, row_scale, _IGNORED)
    own, firsts = walk.first_pass(forward=not walk.needs_terms)
    maxima, sizes = _merged_maxima(own, plan.vocab, group)
    offset = sizes[: group.rank].sum()
    if "top1_agreement" in plan.metrics:
        at_maximum = (own[:, :2] == maxima[:, :2]) & (firsts < NO_ID.value)
        firsts = group.reduce(torch.where(at_maximum, firsts + offset, NO_ID.value), dist.ReduceOp.MIN)
    merged = walk.rescale(own, maxima)
    everywhere = None
    if labels is not None and valid is not None:
        local, everywhere = _placed(labels, valid, offset, sizes.sum(), plan)
        walk.labels = local
        merged[:, LABEL_LOGITS.value] = _label_logits(student, local)
        if teacher is not None:
            merged[:, LABEL_LOGITS.value + 1] = _label_logits(teacher, local)
    merged[:, MAXIMA.value :] = group.reduce(merged[:, MAXIMA.value :].contiguous(), dist.ReduceOp.SUM)

    sums = None
    at_once = plan.want_grad and not walk.variant.THREE_PASSES
    if walk.needs_terms:
        sums = group.reduce(walk.second_pass(merged, gradient=at_once), dist.ReduceOp.SUM)
    if plan.want_grad and not (at_once and walk.needs_terms):
        walk.gradient(merged, sums)
    return rows_of(walk.results(merged, sums, firsts, everywhere), plan)


def _merged_maxima(own: Tensor, vocab: int, group: Group) -> tuple[Tensor, Tensor]:
    """Return the maxima ``[N, MAXIMA]`` over all shards, and these' sizes ``[W]``, int32, by the same all-reduce."""
    n_maxima = len(own) * MAXIMA.value
    both = own.new_zeros(n_maxima + group.size)
    both[:n_maxima] = own[:, : MAXIMA.value].flatten()
    both[n_maxima + group.rank] = vocab
    group.reduce(both, dist.ReduceOp.MAX)
    return both[:n_maxima].view(-1, MAXIMA.value), both[n_maxima:].int()


def _placed(labels: Tensor, valid: Tensor, offset: Tensor, total: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return labels ``[N]`` as ids of this shard, and as ids of the whole vocabulary, for the kernels."""
    if host_can_read(labels.device):
        check_label_values(labels, int(total), plan.objective.ignore_index)
    local = labels - offset
    local = torch.where((local >= 0) & (local < plan.vocab), local, _NOWHERE)
    everywhere = torch.where((labels >= 0) & (labels < total), labels, _NOWHERE)
    return torch.where(valid, local, _IGNORED), torch.where(valid, everywhere, _IGNORED)


def _label_logits(logits: Tensor, local: Tensor) -> Tensor:
    """Return the label's logit ``[N]`` in fp32 where it lies in this shard, else 0."""
    picked = logits.gather(-1, local.clamp(min=0).view(logits.shape[:-1]).unsqueeze(-1))
    return torch.where(local >= 0, picked.flatten().float(), 0.0)
