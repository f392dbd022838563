"""Launches of the Triton kernels for rows that are sharded over processes.

Legend: N tokens, V ids of this process's shard, B batch, S sequence.
"""

import torch
from torch import Tensor

from .._plan import Plan
from .launch import addresses, betas, blocks_for, exponent_scale, launch_options, on_device, slope, variant_of
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
        self._c = exponent_scale(plan, self.variant)

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
                self.student, self.teacher, own if self.labels is None else self.labels, own,
                *addresses(self.student), *addresses(self.teacher),
                self.plan.vocab, self.ignore_index, self._c,
                v.DIVERGENCE, v.HAS_TEACHER, v.HAS_LABELS, v.AT_TEMPERATURE_1, forward,
                BLOCK=self._blocks.size, **launch_options(self._blocks.warps, self._blocks.registers),
            )  # fmt: skip
        return own

    def rescale(self, own: Tensor, maxima: Tensor) -> Tensor:
        """Return this shard's part of ``merged`` ``[N, COLUMNS]``, relative to ``maxima`` ``[N, MAXIMA]``."""
        merged = torch.empty_like(own)
        with on_device(own.device):
            rescale_kernel[(self._n_tokens,)](own, maxima, merged, self._c, **launch_options(warps=1))
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
        v, objective = self.variant, self.plan.objective
        with on_device(merged.device):
            second_pass_kernel[(self._n_tokens,)](
                self.student, self.teacher, merged if self.labels is None else self.labels, self.out, merged,
                merged if sums is None else sums, merged if terms is None else terms,
                merged if firsts is None else firsts, self.row_scale,
                *addresses(self.student), *addresses(self.teacher), *addresses(self.out),
                0 if self.row_scale.dim() == 0 else 1,
                self.plan.vocab, self.ignore_index, self._c, *betas(objective.beta),
                slope(self.plan), 1.0 - objective.kd_ratio,
                v.DIVERGENCE, v.HAS_TEACHER, v.HAS_KD, v.HAS_CE, v.HAS_LABELS, v.AT_TEMPERATURE_1, v.METRICS,
                sums is not None, terms is not None, gradient,
                BLOCK=self._blocks.size, **launch_options(self._blocks.warps, self._blocks.registers),
            )  # fmt: skip

    def results(self, merged: Tensor, sums: Tensor | None, firsts: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return ``results`` of the kernels ``[N, RESULTS]``.

        Args:
            merged (Tensor): ``[N, COLUMNS]``.
            sums (Tensor | None): ``[N, TERMS]``; None where the statistics tell the value.
            firsts (Tensor | None): ``[N, 2]``, first ids at the maxima.
            labels (Tensor | None): ``[N]``, ids of the whole vocabulary, negative where they are none.
        """
        v, objective = self.variant, self.plan.objective
        results = self._empty(RESULTS.value)
        with on_device(merged.device):
            results_kernel[(self._n_tokens,)](
                merged, merged if sums is None else sums, merged if firsts is None else firsts,
                merged if labels is None else labels, results,
                self.ignore_index, self._c, *betas(objective.beta), objective.kd_ratio,
                objective.divergence_scale, 1.0 - objective.kd_ratio,
                v.DIVERGENCE, v.HAS_TEACHER, v.HAS_KD, v.HAS_LABELS, v.AT_TEMPERATURE_1, sums is not None,
                **launch_options(warps=1),
            )  # fmt: skip
        return results

    def _empty(self, columns: int) -> Tensor:
        """Return memory for numbers of each row ``[N, columns]``, in fp32."""
        return torch.empty(self._n_tokens, columns, dtype=torch.float32, device=self.student.device)
