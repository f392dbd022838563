"""Launches of the Triton kernels for rows in parts.

Legend: N tokens, V vocabulary, P parts of a row, n rows of one launch, B batch, S sequence.
"""

import torch
import triton
from torch import Tensor

from ._block import Plan, Rows, slices
from ._triton_kernels import RESULTS
from ._triton_launch import addresses, betas, blocks_for, exponent_scale, on, rows_of, slope, variant_of
from ._triton_split_kernels import (
    COLUMNS,
    TERMS,
    finish_kernel,
    merge_kernel,
    results_kernel,
    statistics_kernel,
)

# Programs that share a row: 8 of them keep a row's pair of V = 128256 in bf16 within 64 KB each.
_PARTS = 8
# Where a device does not tell the size of its cache (and in the interpreter).
_CACHE_BYTES = 2**25


def split_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    plan: Plan,
    grad_out: Tensor | None,
    row_scale: Tensor | None = None,
) -> Rows:
    """``_triton.rows`` with every row split over several programs, and as many rows at a time as half the device's L2
    cache holds: further passes over them read the cache, not memory. Costs six or seven launches per such group.
    """
    n_tokens = student.shape[:-1].numel()
    if n_tokens == 0:
        return Rows.zeros(0, plan, torch.float32, student.device)
    walk = Walk(student, teacher, labels, plan, grad_out, row_scale, parts=_PARTS)
    two_passes = plan.want_grad or walk.needs_terms
    for rows in slices(n_tokens, _rows_in_cache(plan.vocab, student, teacher)):
        merged = walk.merge(walk.statistics(rows, forward=not two_passes))
        sums = firsts = None
        if two_passes:
            at_once = plan.want_grad and not walk.variant.THREE_PASSES
            terms, firsts = walk.finish(rows, merged, gradient=at_once)
            sums, firsts = terms.sum(1), firsts.amin(1)
            if plan.want_grad and not at_once:
                walk.gradient(rows, merged, sums)
        walk.results(rows, merged, sums, firsts)
    return rows_of(walk.all_results, plan)


class Walk:
    """One call's arguments as the kernels take them; arguments as ``_triton.rows``.

    Args:
        parts (int): P, at most.
        ignore_index (int | None): in place of the plan's.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        plan: Plan,
        grad_out: Tensor | None,
        row_scale: Tensor | None,
        parts: int,
        ignore_index: int | None = None,
    ) -> None:
        self.student, self.labels, self.plan = student, labels, plan
        self.teacher = student if teacher is None else teacher
        self.out = student if grad_out is None else grad_out
        self.row_scale = student.new_ones((), dtype=torch.float32) if row_scale is None else row_scale.contiguous()
        self.variant = variant_of(plan, labels is not None)
        self.needs_terms = self.variant.METRICS or self.variant.THREE_PASSES
        self.ignore_index = plan.objective.ignore_index if ignore_index is None else ignore_index
        self._blocks = blocks_for(plan.vocab, self.variant.THREE_PASSES, self.variant.METRICS)
        blocks_in_row = triton.cdiv(plan.vocab, self._blocks.size)
        self.part_ids = triton.cdiv(blocks_in_row, parts) * self._blocks.size
        self.parts = triton.cdiv(plan.vocab, self.part_ids)
        n_tokens = student.shape[:-1].numel()
        self.all_results = torch.empty(n_tokens, RESULTS.value, dtype=torch.float32, device=student.device)
        self._c = exponent_scale(plan, self.variant)

    def statistics(self, rows: slice, forward: bool) -> Tensor:
        """``parts`` of the kernels' legend ``[n, P, COLUMNS]``.

        Args:
            rows (slice): of the N.
            forward (bool): the forward KL's value will be taken from the statistics.
        """
        n, v = rows.stop - rows.start, self.variant
        parts = self._empty(n, self.parts, COLUMNS.value)
        forward = forward and v.DIVERGENCE in ("forward_kl", "symmetric_kl")
        with on(self.student.device):
            statistics_kernel[(n, self.parts)](
                self.student, self.teacher, self._labels(rows), parts, rows.start,
                *addresses(self.student), *addresses(self.teacher),
                self.plan.vocab, self.part_ids, self.ignore_index, self._c,
                v.DIVERGENCE, v.HAS_TEACHER, v.HAS_LABELS, v.AT_1, forward,
                BLOCK=self._blocks.size, num_warps=self._blocks.warps, maxnreg=self._blocks.registers,
            )  # fmt: skip
        return parts

    def merge(self, parts: Tensor, maxima: Tensor | None = None) -> Tensor:
        """``merged`` ``[n, COLUMNS]``, relative to ``maxima`` ``[n, MAXIMA]`` if given."""
        merged = self._empty(len(parts), COLUMNS.value)
        with on(parts.device):
            merge_kernel[(len(parts),)](
                parts, merged if maxima is None else maxima, merged, self._c,
                HAS_MAXIMA=maxima is not None, PARTS=self.parts, num_warps=1,
            )  # fmt: skip
        return merged

    def finish(self, rows: slice, merged: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """``terms`` ``[n, P, TERMS]`` and ``firsts`` ``[n, P, 2]``; with ``gradient`` also that."""
        n = len(merged)
        terms = self._empty(n, self.parts, TERMS.value)
        firsts = torch.empty(n, self.parts, 2, dtype=torch.int32, device=terms.device)
        self._finish(rows, merged, None, terms, firsts, gradient)
        return terms, firsts

    def gradient(self, rows: slice, merged: Tensor, sums: Tensor | None) -> None:
        """The gradient alone; ``sums`` ``[n, TERMS]`` where the divergence needs them."""
        self._finish(rows, merged, sums if self.variant.THREE_PASSES else None, None, None, True)

    def _finish(
        self,
        rows: slice,
        merged: Tensor,
        sums: Tensor | None,
        terms: Tensor | None,
        firsts: Tensor | None,
        gradient: bool,
    ) -> None:
        v, objective = self.variant, self.plan.objective
        with on(merged.device):
            finish_kernel[(len(merged), self.parts)](
                self.student, self.teacher, self._labels(rows), self.out, merged,
                merged if sums is None else sums, merged if terms is None else terms,
                merged if firsts is None else firsts, self.row_scale, rows.start,
                *addresses(self.student), *addresses(self.teacher), *addresses(self.out),
                0 if self.row_scale.dim() == 0 else 1,
                self.plan.vocab, self.part_ids, self.ignore_index, self._c, *betas(objective.beta),
                slope(self.plan), 1.0 - objective.kd_ratio,
                v.DIVERGENCE, v.HAS_TEACHER, v.HAS_KD, v.HAS_CE, v.HAS_LABELS, v.AT_1, v.METRICS,
                sums is not None, terms is not None, gradient,
                BLOCK=self._blocks.size, num_warps=self._blocks.warps, maxnreg=self._blocks.registers,
            )  # fmt: skip

    def results(
        self, rows: slice, merged: Tensor, sums: Tensor | None, firsts: Tensor | None, labels: Tensor | None = None
    ) -> None:
        """Fill ``all_results``.

        Args:
            rows (slice): of the N.
            merged (Tensor): ``[n, COLUMNS]``.
            sums (Tensor | None): ``[n, TERMS]``; None where the statistics tell the value.
            firsts (Tensor | None): ``[n, 2]``, first ids at the maxima.
            labels (Tensor | None): ``[N]``, in place of the call's, with any id from 0 on good.
        """
        v, objective = self.variant, self.plan.objective
        ids = self.plan.vocab if labels is None else 2**31 - 1
        with on(merged.device):
            results_kernel[(len(merged),)](
                merged, merged if sums is None else sums, merged if firsts is None else firsts,
                self._labels(rows) if labels is None else labels[rows], self.all_results[rows],
                ids, self.ignore_index, self._c, *betas(objective.beta), objective.kd_ratio,
                objective.divergence_scale, 1.0 - objective.kd_ratio,
                v.DIVERGENCE, v.HAS_TEACHER, v.HAS_KD, v.HAS_LABELS, v.AT_1, sums is not None, num_warps=1,
            )  # fmt: skip

    def _labels(self, rows: slice) -> Tensor:
        return self.all_results if self.labels is None else self.labels[rows]

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.student.device)


def _rows_in_cache(vocab: int, student: Tensor, teacher: Tensor | None) -> int:
    """Rows whose logits fill half of the L2 cache; a multiple of 4, which keeps what starts at them aligned."""
    cache = _CACHE_BYTES
    if student.device.type == "cuda":
        cache = torch.cuda.get_device_properties(student.device).L2_cache_size
    bytes_per_id = student.element_size() + (0 if teacher is None else teacher.element_size())
    return max(4, cache // 2 // (vocab * bytes_per_id) // 4 * 4)
