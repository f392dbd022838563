"""Launches of the Triton kernels for rows that are sharded over processes.

Legend: N tokens, V ids of this process's shard, B batch, S sequence.
"""

import torch
from torch import Tensor

from .._plan import Plan
from .launch import addressed, blocks_for, factors_of, launch_options, on_device, variant_of
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
        self.needs_terms = self.variant.METRICS or self.variant.THREE_PASSES
        self._n_tokens = student.shape[:-1].numel()
        self._blocks = blocks_for(plan.vocab, self.variant.THREE_PASSES, self.variant.METRICS)
        self._factors = factors_of(plan, self.variant)

    def first_pass(self, forward: bool) -> Tensor:
        """Return ``own`` of the kernels' legend ``[N, COLUMNS]``.

        Args:
            forward (bool): the forward KL's value is taken from these.
        """
        v = self.variant
        own = self._empty(COLUMNS.value)
        forward = forward and v.DIVERGENCE in ("forward_kl", "symmetric_kl")
        with on_device(own.device):
            first_pass_kernel[(self._n_tokens,)](
                **addressed("student", self.student),
                **addressed("teacher", self.teacher),
                labels=own if self.labels is None else self.labels,
                own=own,
                n_ids=self.plan.vocab,
                ignore_index=self.ignore_index,
                c=self._factors.c,
                DIVERGENCE=v.DIVERGENCE,
                HAS_TEACHER=v.HAS_TEACHER,
                HAS_LABELS=v.HAS_LABELS,
                AT_TEMPERATURE_1=v.AT_TEMPERATURE_1,
                FORWARD=forward,
                BLOCK=self._blocks.size,
                **launch_options(self._blocks.warps, self._blocks.registers),
            )
        return own

    def rescale(self, own: Tensor, maxima: Tensor) -> Tensor:
        """Return this shard's part of ``merged`` ``[N, COLUMNS]``, relative to ``maxima`` ``[N, MAXIMA]``."""
        merged = torch.empty_like(own)
        with on_device(own.device):
            rescale_kernel[(self._n_tokens,)](
                own=own, maxima=maxima, merged=merged, c=self._factors.c, **launch_options(warps=1)
            )
        return merged

    def second_pass(self, merged: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Return ``terms`` ``[N, TERMS]`` and ``firsts`` ``[N, 2]``; with ``gradient`` write that, too."""
        terms = self._empty(TERMS.value)
        firsts = torch.empty(self._n_tokens, 2, dtype=torch.int32, device=terms.device)
        self._second_pass(merged, None, terms, firsts, gradient)
        return terms, firsts

    def gradient(self, merged: Tensor, sums: Tensor | None) -> None:
        """Write the gradient alone; ``sums`` ``[N, TERMS]`` where the divergence needs them."""
        self._second_pass(merged, sums if self.variant.THREE_PASSES else None, None, None, True)

    def _second_pass(
        self, merged: Tensor, sums: Tensor | None, terms: Tensor | None, firsts: Tensor | None, gradient: bool
    ) -> None:
        """Launch a further pass over the shard; arguments as ``second_pass_kernel``."""
        v, factors = self.variant, self._factors
        with on_device(merged.device):
            second_pass_kernel[(self._n_tokens,)](
                **addressed("student", self.student),
                **addressed("teacher", self.teacher),
                **addressed("out", self.out),
                labels=merged if self.labels is None else self.labels,
                merged=merged,
                sums=merged if sums is None else sums,
                terms=merged if terms is None else terms,
                firsts=merged if firsts is None else firsts,
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
                AT_TEMPERATURE_1=v.AT_TEMPERATURE_1,
                METRICS=v.METRICS,
                HAS_SUMS=sums is not None,
                HAS_TERMS=terms is not None,
                GRADIENT=gradient,
                BLOCK=self._blocks.size,
                **launch_options(self._blocks.warps, self._blocks.registers),
            )

    def results(self, merged: Tensor, sums: Tensor | None, firsts: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return ``results`` of the kernels ``[N, RESULTS]``.

        Args:
            merged (Tensor): ``[N, COLUMNS]``.
            sums (Tensor | None): ``[N, TERMS]``; None where the statistics tell the value.
            firsts (Tensor | None): ``[N, 2]``, first ids at the maxima.
            labels (Tensor | None): ``[N]``, ids of the whole vocabulary, negative where they are none.
        """
        v, factors = self.variant, self._factors
        results = self._empty(RESULTS.value)
        with on_device(merged.device):
            results_kernel[(self._n_tokens,)](
                merged=merged,
                sums=merged if sums is None else sums,
                firsts=merged if firsts is None else firsts,
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
                HAS_TEACHER=v.HAS_TEACHER,
                HAS_KD=v.HAS_KD,
                HAS_LABELS=v.HAS_LABELS,
                AT_TEMPERATURE_1=v.AT_TEMPERATURE_1,
                HAS_SUMS=sums is not None,
                **launch_options(warps=1),
            )
        return results

    def _empty(self, columns: int) -> Tensor:
        """Return memory for numbers of each row ``[N, columns]``, in fp32."""
        return torch.empty(self._n_tokens, columns, dtype=torch.float32, device=self.student.device)
