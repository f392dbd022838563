"""Launches of the Triton kernels that give a row to one program.

Legend: N tokens, V vocabulary, B batch, S sequence.
"""

import torch
import triton
from torch import Tensor

from .._plan import Plan, Rows
from .launch import addressed, blocks_for, factors_of, launch_options, on_device, rows_of, variant_of
from .row_kernels import RESULTS, rows_kernel, scale_kernel


def rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    plan: Plan,
    grad_out: Tensor | None,
    row_scale: Tensor | None = None,
    backend: str = "triton",
) -> Rows:
    """Compute losses, metrics and gradients of all rows.

    Args:
        student (Tensor): logits ``[N, V']`` or ``[B, S, V']``, V' >= `plan.vocab`; bf16, fp16 or fp32, any strides.
        teacher (Tensor | None): the same leading shape.
        labels (Tensor | None): ``[N]`` int64, contiguous.
        plan (Plan): what to compute.
        grad_out (Tensor | None): shape of `student`; receives the gradient of the rows' losses. May be `student`.
        row_scale (Tensor | None): 0-d or ``[N, 1]``, multiplies the gradients.
        backend (str): "triton", one launch, a program per row; "triton-backwards", the same with the second pass from
            the last id, which the first has left in the cache.

    Returns:
        Rows: in fp32, 0 where a token is ignored.
    """
    n_tokens = student.shape[:-1].numel()
    assert labels is None or labels.is_contiguous()
    results = torch.empty(n_tokens, RESULTS.value, dtype=torch.float32, device=student.device)
    if n_tokens == 0:
        return Rows.zeros(0, plan, torch.float32, student.device)
    variant = variant_of(plan, labels is not None, backend == "triton-backwards")
    blocks = blocks_for(plan.vocab, variant.THREE_PASSES, variant.METRICS)
    teacher = student if teacher is None else teacher
    out = student if grad_out is None else grad_out
    scale = student.new_ones((), dtype=torch.float32) if row_scale is None else row_scale.contiguous()
    with on_device(student.device):
        rows_kernel[(n_tokens,)](
            **addressed("student", student),
            **addressed("teacher", teacher),
            **addressed("out", out),
            labels=results if labels is None else labels,
            results=results,
            row_scale=scale,
            scale_stride=0 if scale.dim() == 0 else 1,
            n_ids=plan.vocab,
            ignore_index=plan.objective.ignore_index,
            **factors_of(plan, variant)._asdict(),
            **variant._asdict(),
            BLOCK=blocks.size,
            **launch_options(blocks.warps, blocks.registers),
        )
    return rows_of(results, plan)


class TritonBlockLoss:
    """Compute blocks of rows as ``_torch.block.BlockLoss`` does.

    Args:
        plan (Plan): what to compute.
        backend (str): as for `rows`.
        scale (Tensor | None): 0-d, multiplies every gradient.
    """

    def __init__(self, plan: Plan, backend: str, scale: Tensor | None = None) -> None:
        self.plan, self.backend, self.scale = plan, backend, scale

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        grad_out: Tensor | None,
        row_scale: Tensor | None = None,
    ) -> Rows:
        """Compute one block, of any number of rows; arguments as `rows`."""
        scale = self.scale if row_scale is None else row_scale
        return rows(student, teacher, labels, self.plan, grad_out, scale, self.backend)

    def release(self) -> None:
        """Do nothing: the kernels need no workspaces."""


def scale_(grad: Tensor, scale: Tensor) -> Tensor:
    """Multiply `grad` ``[N, V]``, contiguous, by `scale`, 0-d or one per row, in place."""
    block, scale = 4096, scale.contiguous()
    n_rows, n_ids = grad.shape
    if n_rows:
        with on_device(grad.device):
            scale_kernel[(n_rows, triton.cdiv(n_ids, block))](
                grad=grad, scale=scale, n_ids=n_ids, ROWS=scale.dim() > 0, BLOCK=block, **launch_options(warps=8)
            )
    return grad
