"""Distillation from hidden states: the logits of either model exist one chunk of tokens at a time.

Legend: N tokens, n valid tokens, C tokens of a chunk, V vocabulary, D hidden width of the model at hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._block import BlockLoss, Plan, Rows, gradient_scale, row_blocks, rows_per_block, scaled, working_dtype

# Bytes of both models' chunks of logits. CPU: matrix products are at full speed from about 512 tokens on.
# Elsewhere: 2048 tokens of a 128256-word vocabulary in bf16.
_CHUNK_BYTES = {"cpu": 2**28}
_CHUNK_BYTES_ELSEWHERE = 2**30


class Heads(NamedTuple):
    """Inputs of the matrix products; the teacher's are None where it is not needed."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V', D], V' >= plan.vocab
    bias: Tensor | None  # [V']
    teacher_hidden: Tensor | None  # [N, D]
    teacher_weight: Tensor | None  # [V', D]
    teacher_bias: Tensor | None  # [V']


class Wants(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of the summed loss, not yet scaled; None where not wanted."""

    hidden: Tensor | None  # [N, D] in the dtype of the hidden states
    weight: Tensor | None  # [V', D] in fp32 (fp64), or in bf16 when one chunk made it
    bias: Tensor | None  # [V'] in the working dtype


class LinearKD(torch.autograd.Function):
    """The gradients are computed with the loss, chunk by chunk, and scaled in backward.

    With reduction "none" and a trainable head the head's gradient mixes tokens before their incoming
    gradients are known: there backward walks the chunks a second time.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor,
        plan: Plan,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (0-d or ``[N]``), sums of the metrics ``[M]`` and number of valid tokens (0-d)."""
        heads = Heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
        index, labels = _valid(labels, plan.objective.ignore_index, hidden.device)
        ctx.wants = Wants(*(plan.want_grad and needed for needed in ctx.needs_input_grad[:3]))
        ctx.late = plan.reduction == "none" and (ctx.wants.weight or ctx.wants.bias)
        now = Wants(False, False, False) if ctx.late else ctx.wants
        rows, grads = _walk(heads, index, labels, plan, chunk_tokens, now)

        n_valid = hidden.shape[0] if index is None else len(index)
        count = torch.full((), n_valid, device=hidden.device)
        loss, metrics = rows.reduce(plan.reduction, count)
        ctx.plan, ctx.chunk_tokens, ctx.count, ctx.dtypes = (
            plan,
            chunk_tokens,
            count,
            (hidden.dtype, weight.dtype),
        )
        if ctx.late:
            # a tensor from inference mode cannot be saved, its copy can
            saved = (*heads, index, labels)
            ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in saved))
        else:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(metrics, count)
        ctx.set_materialize_grads(False)
        return loss, metrics, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if grad_loss is None:
            return None, None, None, *nothing
        scale = gradient_scale(grad_loss, ctx.plan.reduction, ctx.count)
        if ctx.late:
            *heads, index, labels = ctx.saved_tensors
            plan = ctx.plan._replace(metrics=())
            with torch.autocast(labels.device.type, enabled=False):
                _, grads = _walk(Heads(*heads), index, labels, plan, ctx.chunk_tokens, ctx.wants, row_scale=scale)
            scale = torch.ones_like(ctx.count, dtype=grad_loss.dtype)
        else:
            grads = Gradients(*ctx.saved_tensors)
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if grads.hidden is None else scaled(grads.hidden, scale, hidden_dtype),
            None if grads.weight is None else scaled(grads.weight, scale, weight_dtype),
            None if grads.bias is None else scaled(grads.bias, scale, weight_dtype),
            *nothing,
        )


def chunk_size(n_tokens: int, vocab: int, element_bytes: int, device: torch.device) -> int:
    """Tokens per chunk: as few equal chunks as the byte budget allows, in multiples of 128 tokens."""
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)
    most = max(128, budget // (vocab * element_bytes) // 128 * 128)
    n_chunks = -(-n_tokens // most)
    return min(most, -(-n_tokens // max(1, n_chunks) // 128) * 128) or 128


def _valid(labels: Tensor, ignore_index: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Indices of the valid tokens ``[n]`` (None if all are) and their labels ``[n]``, both on `device`."""
    index = (labels != ignore_index).nonzero().squeeze(-1)
    if len(index) == len(labels):
        return None, labels.to(device, non_blocking=True)
    return index.to(device, non_blocking=True), labels[index].to(device, non_blocking=True)


def _walk(
    heads: Heads,
    index: Tensor | None,
    labels: Tensor,
    plan: Plan,
    chunk_tokens: int | None,
    wants: Wants,
    row_scale: Tensor | None = None,
) -> tuple[Rows, Gradients]:
    """All valid tokens, one chunk after another.

    Args:
        heads (Heads): inputs of the matrix products.
        index (Tensor | None): ``[n]``, positions of the valid tokens; None if all are.
        labels (Tensor): ``[n]``, of the valid tokens.
        plan (Plan): what to compute.
        chunk_tokens (int | None): C; None chooses.
        wants (Wants): gradients to compute.
        row_scale (Tensor | None): ``[N, 1]``, multiplies the gradient of each token's loss.
    """
    hidden, device, vocab, n_valid = heads.hidden, heads.hidden.device, plan.vocab, len(labels)
    weight, bias = heads.weight[:vocab], None if heads.bias is None else heads.bias[:vocab]
    teacher_weight = None if heads.teacher_weight is None else heads.teacher_weight[:vocab]
    teacher_bias = None if heads.teacher_bias is None else heads.teacher_bias[:vocab]
    dtype = working_dtype(hidden, heads.teacher_hidden)
    plan = plan._replace(want_grad=any(wants))
    rows = Rows.zeros(hidden.shape[0], plan, dtype, device)
    grads = Gradients(
        torch.zeros_like(hidden) if wants.hidden else None,
        None,
        torch.zeros(heads.weight.shape[0], dtype=dtype, device=device) if wants.bias else None,
    )
    head_grad = _HeadGradient(heads.weight, vocab) if wants.weight else None
    if n_valid == 0:
        return rows, grads._replace(weight=None if head_grad is None else head_grad.total())

    if chunk_tokens is None:
        element_bytes = hidden.element_size() + (0 if teacher_weight is None else teacher_weight.element_size())
        chunk_tokens = chunk_size(n_valid, vocab, element_bytes, device)
    chunk_tokens = min(chunk_tokens, n_valid)
    student_buffer = hidden.new_empty(chunk_tokens, vocab)
    teacher_buffer = None if teacher_weight is None else teacher_weight.new_empty(chunk_tokens, vocab)
    block_loss = BlockLoss(plan, min(chunk_tokens, rows_per_block(vocab, device)), dtype, device)
    for start in range(0, n_valid, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, n_valid))
        size = chunk.stop - chunk.start
        pick = chunk if index is None else index[chunk]  # positions among the N tokens
        h = hidden[pick]
        student_logits = _logits(h, weight, bias, student_buffer[:size])
        teacher_logits = None
        if teacher_buffer is not None:
            teacher_logits = _logits(heads.teacher_hidden[pick], teacher_weight, teacher_bias, teacher_buffer[:size])

        for block in row_blocks(size, vocab, device):
            where = slice(start + block.start, start + block.stop)  # positions among the n valid tokens
            at = where if index is None else index[where]
            s = student_logits[block]
            loss, metrics = block_loss(
                s,
                None if teacher_logits is None else teacher_logits[block],
                labels[where],
                s if plan.want_grad else None,
                None if row_scale is None else row_scale[at],
            )
            rows.loss[at] = loss
            for into, metric in zip(rows.metrics, metrics, strict=True):
                into[at] = metric.to(into.dtype)

        if wants.hidden:
            grads.hidden[pick] = student_logits @ weight
        if wants.weight:
            head_grad.add(student_logits, h, last=chunk.stop == n_valid)
        if wants.bias:
            grads.bias[:vocab] += student_logits.sum(0, dtype=dtype)
    return rows, grads._replace(weight=None if head_grad is None else head_grad.total())


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden @ weight.T (+ bias) ``[C, V]``."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


class _HeadGradient:
    """Sum over chunks of gradient.T @ hidden ``[V', D]``, in fp32 (fp64) as soon as there are two chunks.

    A bf16 product is rounded once. In fp16 a sum over tokens soon leaves the range: there the factors are
    made fp32.
    """

    def __init__(self, weight: Tensor, vocab: int) -> None:
        self._weight, self._vocab = weight, vocab
        self._sum: Tensor | None = None
        self._product: Tensor | None = None

    def add(self, grad: Tensor, hidden: Tensor, last: bool) -> None:
        """Add one chunk: gradient ``[C, V]``, hidden states ``[C, D]``; `last` if no other follows."""
        own = self._weight.dtype
        if self._sum is None:
            keep = own in (torch.float32, torch.float64) or (own == torch.bfloat16 and last)
            self._sum = torch.zeros_like(self._weight, dtype=own if keep else torch.float32)
        into = self._sum[: self._vocab]
        if into.dtype == own:
            into.addmm_(grad.t(), hidden)
        elif own == torch.float16:
            hidden = hidden.float()
            for rows in row_blocks(self._vocab, len(grad), grad.device):
                into[rows].addmm_(grad[:, rows].t().float(), hidden)
        else:
            if self._product is None:
                self._product = grad.new_empty(self._vocab, hidden.shape[1])
            torch.mm(grad.t(), hidden, out=self._product)
            # block by block, because adding bf16 to fp32 makes an fp32 copy of its operand
            for rows in row_blocks(self._vocab, hidden.shape[1], grad.device):
                into[rows] += self._product[rows]

    def total(self) -> Tensor:
        """The sum, which is 0 if there was no chunk."""
        return torch.zeros_like(self._weight) if self._sum is None else self._sum
