"""Launches of the Triton kernels for rows that are sharded over processes.

Legend: N tokens, V ids of this process's shard, B batch, S sequence.
"""

# pyright: reportArgumentType=false
# a launch passes plain values for what its kernel declares as tl.constexpr, which is what Triton wants

import torch
from torch import Tensor

from .._plan import Plan
from .launch import addressed, blocks_for, factors_of, launch_options, on_device, variant_of, width_of
from .row_kernels import RESULTS
from .shard_kernels import (
    COLUMNS,
    TERMS,
    first_pass_kernel,
    rescale_kernel,
    results_kernel,
    second_pass_kernel,
)


class Walk:
    """Launch one call's passes over this process's shard; arguments as ``rows.rows``.

    Args:
        ignore_index (int): in place of the plan's.

    Attributes:
        labels (Tensor | None): ``[N]``, ids of this shard or what stands for other labels.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        plan: Plan,
        grad_out: Tensor | None,
        row_scale: Tensor | None,
        ignore_index: int,
    ) -> None:
        self.student, self.labels, self.plan, self.ignore_index = student, labels, plan, ignore_index
        self.teacher = student if teacher is None else teacher
        self.out = student if grad_out is None else grad_out
        self.row_scale = student.new_ones((), dtype=torch.float32) if row_scale is None else row_scale.contiguous()
        self.variant = variant_of(plan, labels is not None)
        v = self.variant
        self.needs_terms = v.KL or v.ENTROPIES or v.ACCEPTANCE or v.THREE_PASSES
        self._n_tokens = student.shape[:-1].numel()
        self._factors = factors_of(plan, self.variant)
        self._width = width_of(self.student, self.teacher, self.out)
        self._blocks = blocks_for(plan.vocab, self.variant, self._width)

    def first_pass(self, forward: bool) -> tuple[Tensor, Tensor]:
        """Return ``own`` of the kernels' legend ``[N, COLUMNS]``, and ``firsts`` ``[N, 2]``, first ids at its maxima.

        Args:
            forward (bool): the forward KL's value is taken from these.
        """
        v = self.variant
        own = self._empty(COLUMNS.value)
        firsts = torch.empty(self._n_tokens, 2, dtype=torch.int32, device=own.device)
        forward = forward and v.DIVERGENCE in ("forward_kl", "symmetric_kl")
        with on_device(own.device):
            first_pass_kernel[(self._n_tokens,)](
                **addressed("student", self.student, self._width),
                **addressed("teacher", self.teacher, self._width),
                labels=own if self.labels is None else self.labels,
                own=own,
                firsts=firsts,
                n_ids=self.plan.vocab,
                ignore_index=self.ignore_index,
                c=self._factors.c,
                DIVERGENCE=v.DIVERGENCE,
                HAS_TEACHER=v.HAS_TEACHER,
                HAS_LABELS=v.HAS_LABELS,
                STUDENT_AT_1=v.STUDENT_AT_1,
                TEACHER_AT_1=v.TEACHER_AT_1,
                FORWARD=forward,
                AGREEMENT=v.AGREEMENT,
                BLOCK=self._blocks.size,
                WIDTH=self._width,
                **launch_options(self._blocks.warps, self._blocks.registers),
            )
        return own, firsts

    def rescale(self, own: Tensor, maxima: Tensor) -> Tensor:
        """Return this shard's part of ``merged`` ``[N, COLUMNS]``, relative to ``maxima`` ``[N, MAXIMA]``."""
        merged = torch.empty_like(own)
        with on_device(own.device):
            rescale_kernel[(self._n_tokens,)](
                own=own, maxima=maxima, merged=merged, c=self._factors.c, **launch_options(warps=1)
            )
        return merged

    def second_pass(self, merged: Tensor, gradient: bool) -> Tensor:
        """Return ``terms`` ``[N, TERMS]``; with ``gradient`` write that, too."""
        terms = self._empty(TERMS.value)
        self._second_pass(merged, None, terms, gradient)
        return terms

    def gradient(self, merged: Tensor, sums: Tensor | None) -> None:
        """Write the gradient alone; ``sums`` ``[N, TERMS]`` where the divergence needs them."""
        self._second_pass(merged, sums if self.variant.THREE_PASSES else None, None, True)

    def _second_pass(self, merged: Tensor, sums: Tensor | None, terms: Tensor | None, gradient: bool) -> None:
        """Launch a further pass over the shard; arguments as ``second_pass_kernel``."""
        v, factors = self.variant, self._factors
        with on_device(merged.device):
            second_pass_kernel[(self._n_tokens,)](
                **addressed("student", self.student, self._width),
                **addressed("teacher", self.teacher, self._width),
                **addressed("out", self.out, self._width),
                labels=merged if self.labels is None else self.labels,
                merged=merged,
                sums=merged if sums is None else sums,
                terms=merged if terms is None else terms,
                row_scale=self.row_scale,
                scale_stride=0 if self.row_scale.dim() == 0 else 1,
                n_ids=self.plan.vocab,
                ignore_index=self.ignore_index,
                c=factors.c,
                beta=factors.beta,
                one_minus_beta=factors.one_minus_beta,
                kd_slope=factors.kd_slope,
                ce_weight=factors.ce_weight,
                DIVERGENCE=v.DIVERGENCE,
                HAS_TEACHER=v.HAS_TEACHER,
                HAS_KD=v.HAS_KD,
                HAS_CE=v.HAS_CE,
                HAS_LABELS=v.HAS_LABELS,
                STUDENT_AT_1=v.STUDENT_AT_1,
                TEACHER_AT_1=v.TEACHER_AT_1,
                KL=v.KL,
                ENTROPIES=v.ENTROPIES,
                ACCEPTANCE=v.ACCEPTANCE,
                HAS_SUMS=sums is not None,
                HAS_TERMS=terms is not None,
                GRADIENT=gradient,
                BETA_ABOVE_HALF=v.BETA_ABOVE_HALF,
                APPROXIMATE=v.APPROXIMATE,
                BLOCK=self._blocks.size,
                WIDTH=self._width,
                **launch_options(self._blocks.warps, self._blocks.registers),
            )

    def results(self, merged: Tensor, sums: Tensor | None, firsts: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``results`` of the kernels ``[N, RESULTS]``.

        Args:
            merged (Tensor): ``[N, COLUMNS]``.
            sums (Tensor | None): ``[N, TERMS]``; None where the statistics tell the value.
            firsts (Tensor): ``[N, 2]``, first ids at the maxima; anything where nobody asks for agreement.
            labels (Tensor | None): ``[N]``, ids of the whole vocabulary, negative where they are none.
        """
        v, factors = self.variant, self._factors
        results = self._empty(RESULTS.value)
        with on_device(merged.device):
            results_kernel[(self._n_tokens,)](
                merged=merged,
                sums=merged if sums is None else sums,
                firsts=firsts,
                labels=merged if labels is None else labels,
                results=results,
                ignore_index=self.ignore_index,
                c=factors.c,
                beta=factors.beta,
                one_minus_beta=factors.one_minus_beta,
                kd_ratio=factors.kd_ratio,
                kd_scale=factors.kd_scale,
                ce_weight=factors.ce_weight,
                DIVERGENCE=v.DIVERGENCE,
                HAS_KD=v.HAS_KD,
                HAS_LABELS=v.HAS_LABELS,
                STUDENT_AT_1=v.STUDENT_AT_1,
                TEACHER_AT_1=v.TEACHER_AT_1,
                AGREEMENT=v.AGREEMENT,
                HAS_SUMS=sums is not None,
                **launch_options(warps=1),
            )
        return results

    def _empty(self, columns: int) -> Tensor:
        """Return memory for numbers of each row ``[N, columns]``, in fp32."""
        return torch.empty(self._n_tokens, columns, dtype=torch.float32, device=self.student.device)
