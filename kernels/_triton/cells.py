"""The arithmetic against a teacher's stored ids, with every pass over a row of logits in a Triton kernel.

Legend: n rows of a block, V vocabulary, k stored ids.
"""

# pyright: reportArgumentType=false
# a launch passes plain values for what its kernel declares as tl.constexpr, which is what Triton wants

import torch
from torch import Tensor

from .._plan import Plan
from .._torch.block import LOG2_E, known
from .._torch.cells import CellsLoss
from .._torch.coarse import Gathered, Gradient, Rest, likeliest, rest_entropy, stored_logits
from .launch import addressed, launch_options, on_device, rest_blocks_for, width_of
from .rest_kernels import SUMS, TERMS, rest_gradient_kernel, rest_sums_kernel


class TritonCellsBlockLoss(CellsLoss):
    """Compute blocks of any number of rows without a workspace: each kernel reads the logits, in their own dtype, once.

    Logits are bf16, fp16 or fp32. -inf is written over the stored ids in them, so that the caller has no more use for
    them. Of a label outside of [0, V) the cross-entropy is NaN. The base class computes what is k + 1 wide, in fp32.

    Args:
        plan (Plan): what to compute.
        scale (Tensor | None): 0-d, multiplies every gradient.
    """

    def __init__(self, plan: Plan, scale: Tensor | None = None) -> None:
        super().__init__(plan, torch.float32, 1.0 if scale is None else scale)

    def release(self) -> None:
        """Do nothing: the kernels need no workspaces."""

    def _read(self, student: Tensor, ids: Tensor, labels: Tensor) -> Gathered:
        """Gather what is stored, take it out of `student`, and sum up what is left."""
        vocab = student.shape[-1]
        stored = stored_logits(student, ids, torch.float32)
        label = _label_logits(student, labels) if self._class_loss else None
        # -inf is added, not set, because padding has no column of its own: 0 is added to some other id for it
        taken_out = torch.zeros_like(stored, dtype=student.dtype).masked_fill_(ids < vocab, -torch.inf)
        student.scatter_add_(-1, ids.clamp(max=vocab - 1), taken_out)

        temperature = self.plan.objective.temperature if self._kd_value else 1.0
        also_at_1 = self._kd_value and self._separate
        sums, firsts = _rest_sums(student, temperature, also_at_1, self._entropy, self._agreement)
        largest, total_t, total_1, moment = sums.split(1, -1)
        if not also_at_1:
            total_1 = total_t
        entropy = rest_entropy(total_1, moment) if self._entropy else None
        first = None
        if self._agreement:  # of the stored ids and the rest's first one
            ids_of_row = torch.cat([ids, firsts.unsqueeze(-1)], -1)
            first = likeliest(torch.cat([stored, largest], -1), ids_of_row, vocab)
        return Gathered(
            stored,
            label,
            first,
            Rest(largest, total_t, entropy if self._shared else None) if self._kd_value else None,
            Rest(largest, total_1, entropy) if self._separate else None,
        )

    def _write(
        self, student: Tensor, gathered: Gathered, gradient: Gradient, ids: Tensor, labels: Tensor, grad_out: Tensor
    ) -> None:
        """Write the rest's gradient, and then what is stored, rounded once each."""
        vocab, stored, of_rest = student.shape[-1], gradient.stored, labels
        if gradient.label is not None:  # the kernel subtracts at a label of the rest
            hit = ids == labels.unsqueeze(-1)
            stored = stored - gradient.label * hit
            of_rest = labels.masked_fill(hit.any(-1), -1)
        shares = [share for share in (gradient.share_t, gradient.share_1) if share is not None]
        temperature = 1.0 if gradient.share_t is None else self.plan.objective.temperature
        largest = known(gathered.at_t if gathered.at_1 is None else gathered.at_1).largest
        _rest_gradient(student, temperature, largest, shares, of_rest, gradient.label, grad_out)
        # the kernel has written 0 where an id is stored, and padding adds 0 to some other id as in ``_read``
        stored = stored.masked_fill(ids == vocab, 0.0).to(grad_out.dtype)
        grad_out.scatter_add_(-1, ids.clamp(max=vocab - 1), stored)


def _label_logits(student: Tensor, labels: Tensor) -> Tensor:
    """Return the labels' logits ``[n, 1]`` in fp32; NaN where there is no such id, which the host does not see."""
    vocab, labels = student.shape[-1], labels.unsqueeze(-1)
    picked = student.gather(-1, labels.clamp(0, vocab - 1)).float()
    return picked.where((labels >= 0) & (labels < vocab), torch.nan)


def _rest_sums(
    student: Tensor, temperature: float, also_at_1: bool, moment: bool, agreement: bool
) -> tuple[Tensor, Tensor]:
    """Return ``sums`` of the kernels' legend ``[n, SUMS]``, and the first ids at the rest's maxima ``[n]`` int64.

    Args:
        student (Tensor): ``[n, V]``, -inf where an id is stored.
        temperature (float): T.
        also_at_1 (bool): sum up at T = 1 too, where T is another.
        moment (bool): sum what the entropy at T = 1 needs.
        agreement (bool): find the first ids; else they are anything.
    """
    n_rows, vocab = student.shape
    sums = torch.empty(n_rows, SUMS.value, dtype=torch.float32, device=student.device)
    firsts = torch.empty(n_rows if agreement else 0, dtype=torch.int64, device=student.device)
    width = width_of(student)
    blocks = rest_blocks_for(vocab, width)
    with on_device(student.device):
        rest_sums_kernel[(n_rows,)](
            **addressed("student", student, width),
            sums=sums,
            firsts=firsts,
            n_ids=vocab,
            c=LOG2_E / temperature,
            STUDENT_AT_1=also_at_1,
            MOMENT=moment,
            AGREEMENT=agreement,
            BLOCK=blocks.size,
            WIDTH=width,
            **launch_options(blocks.warps, blocks.registers),
        )
    return sums, firsts


def _rest_gradient(
    student: Tensor,
    temperature: float,
    largest: Tensor,
    shares: list[Tensor],
    labels: Tensor,
    label_weight: Tensor | None,
    grad_out: Tensor,
) -> None:
    """Write the gradient by the rest ``[n, V]``, 0 where an id is stored.

    Args:
        student (Tensor): ``[n, V]``, -inf where an id is stored.
        temperature (float): of the first share.
        largest (Tensor): ``[n, 1]``, of the rest.
        shares (list[Tensor]): ``[n, 1]``, one or two, the second at T = 1.
        labels (Tensor): ``[n]`` int64, negative where the label is stored.
        label_weight (Tensor | None): ``[n, 1]``, is subtracted at the label; None for nothing.
        grad_out (Tensor): ``[n, V]``; may be `student`.
    """
    n_rows, vocab = student.shape
    # of one share the second is not read, nor is the weight of no label
    terms = torch.cat([largest, shares[0], shares[-1], largest if label_weight is None else label_weight], -1)
    assert terms.shape == (n_rows, TERMS.value) and terms.dtype == torch.float32
    width = width_of(student, grad_out)
    blocks = rest_blocks_for(vocab, width)
    with on_device(student.device):
        rest_gradient_kernel[(n_rows,)](
            **addressed("student", student, width),
            **addressed("out", grad_out, width),
            labels=labels,
            terms=terms,
            n_ids=vocab,
            c=LOG2_E / temperature,
            BOTH=len(shares) > 1,
            HAS_LABEL=label_weight is not None,
            BLOCK=blocks.size,
            WIDTH=width,
            **launch_options(blocks.warps, blocks.registers),
        )
