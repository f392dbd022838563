"""Launches of the Triton kernels that give a row to one program.

Legend: N tokens, V vocabulary, B batch, S sequence.
"""

# pyright: reportArgumentType=false
# a launch passes plain values for what its kernel declares as tl.constexpr, which is what Triton wants

import torch
from torch import Tensor

from .._plan import Plan, Rows
from .launch import addressed, blocks_for, factors_of, launch_options, on_device, rows_of, variant_of, width_of
from .row_kernels import RESULTS, rows_kernel, scale_kernel


def rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    plan: Plan,
    grad_out: Tensor | None,
    row_scale: Tensor | None = None,
) -> Rows:
    """Compute losses, metrics and gradients of all rows.

    Args:
        student (Tensor): logits ``[N, V']`` or ``[B, S, V']``, V' >= `plan.vocab`; bf16, fp16 or fp32, any strides.
        teacher (Tensor | None): the same leading shape.
        labels (Tensor | None): ``[N]`` int64, contiguous.
        plan (Plan): what to compute.
        grad_out (Tensor | None): shape of `student`; receives the gradient of the rows' losses. May be `student`.
        row_scale (Tensor | None): 0-d or ``[N, 1]``, multiplies the gradients.

    Returns:
        Rows: in fp32, 0 where a token is ignored.
    """
    n_tokens = student.shape[:-1].numel()
    assert labels is None or labels.is_contiguous()
    results = torch.empty(n_tokens, RESULTS.value, dtype=torch.float32, device=student.device)
    if n_tokens == 0:
        return Rows.zeros(0, plan, torch.float32, student.device)
    variant = variant_of(plan, labels is not None)
    teacher = student if teacher is None else teacher
    out = student if grad_out is None else grad_out
    scale = student.new_ones((), dtype=torch.float32) if row_scale is None else row_scale.contiguous()
    width = width_of(student, teacher, out)
    blocks = blocks_for(plan.vocab, variant, width)
    with on_device(student.device):
        rows_kernel[(n_tokens,)](
            **addressed("student", student, width),
            **addressed("teacher", teacher, width),
            **addressed("out", out, width),
            labels=results if labels is None else labels,
            results=results,
            row_scale=scale,
            scale_stride=0 if scale.dim() == 0 else 1,
            n_ids=plan.vocab,
            ignore_index=plan.objective.ignore_index,
            **factors_of(plan, variant)._asdict(),
            **variant._asdict(),
            BLOCK=blocks.size,
            WIDTH=width,
            **launch_options(blocks.warps, blocks.registers),
        )
    return rows_of(results, plan)


class TritonBlockLoss:
    """Compute blocks of rows as ``_torch.block.BlockLoss`` does.

    Args:
        plan (Plan): what to compute.
        scale (Tensor | None): 0-d, multiplies every gradient.
    """

    def __init__(self, plan: Plan, scale: Tensor | None = None) -> None:
        self.plan, self.scale = plan, scale

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
        return rows(student, teacher, labels, self.plan, grad_out, scale)

    def release(self) -> None:
        """Do nothing: the kernels need no workspaces."""


def scaled_rows(grad: Tensor, scale: Tensor, in_place: bool) -> Tensor:
    """Multiply `grad` ``[N, V]``, contiguous, by `scale`, 0-d or one per row; in place, or into a new tensor."""
    out, scale = grad if in_place else torch.empty_like(grad), scale.contiguous()
    n_rows, n_ids = grad.shape
    if n_rows:
        with on_device(grad.device):
            scale_kernel[(n_rows,)](
                grad=grad,
                out=out,
                scale=scale,
                n_ids=n_ids,
                ROWS=scale.dim() > 0,
                IN_PLACE=in_place,
                BLOCK=4096,
                **launch_options(warps=8),
            )
    return out
