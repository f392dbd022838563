"""Distillation from hidden states: the logits of either model exist one chunk of tokens at a time.

Legend: N tokens, n valid tokens, C tokens of a chunk, V vocabulary, D hidden width of the model at hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._derivatives import anchor, on_graph_of, refuse_tangents, refuse_transforms
from ._float8 import Float8Product, padded
from ._meta import META
from ._plan import (
    Plan,
    Rows,
    Tokens,
    autocast_type,
    chunk_size,
    rows_per_block,
    slices,
    valid_tokens,
    working_dtype,
)
from ._scaling import mean_factor, mean_is_inside, mean_scale, remaining_scale, retains_graph, scaled
from ._torch.block import BlockLoss
from ._torch.head_gradient import HeadGradient
from ._torch.meta import MetaBlockLoss


class Heads(NamedTuple):
    """Hold the inputs of the matrix products; the teacher's are None where it is not needed."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V', D], V' >= plan.vocab
    bias: Tensor | None  # [V']
    teacher_hidden: Tensor | None  # [N, D]
    teacher_weight: Tensor | None  # [V', D]
    teacher_bias: Tensor | None  # [V']
    teacher_scale: Tensor | None = None  # [V'], of a teacher_weight in 8-bit floats


class NeededGradients(NamedTuple):
    """Say which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    def wait_for_backward(self, reduction: str) -> bool:
        """Return whether they need the incoming ones first, which weigh the tokens in the sum that a head's is."""
        return reduction == "none" and (self.weight or self.bias)

    def before_backward(self, reduction: str) -> "NeededGradients":
        """Return those to compute together with the loss."""
        return NeededGradients(False, False, False) if self.wait_for_backward(reduction) else self


class Gradients(NamedTuple):
    """Hold gradients of the summed loss, or of the mean where ``mean_is_inside``, before they are scaled."""

    hidden: Tensor | None  # [N, D] in the dtype of the hidden states
    weight: Tensor | None  # [V', D] in fp32 (fp64), or in bf16 when one chunk made it
    bias: Tensor | None  # [V'] in the working dtype


class LinearKD(torch.autograd.Function):
    """Compute the gradients together with the loss, chunk by chunk, and scale them in backward.

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
        teacher_scale: Tensor | None,
        labels: Tensor,
        plan: Plan,
        chunk_tokens: int | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (0-d or ``[N]``), sums of the metrics ``[M]`` and number of valid tokens (0-d)."""
        heads = Heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, teacher_scale)
        ctx.needed = NeededGradients(*(plan.want_grad and needed for needed in ctx.needs_input_grad[:3]))
        ctx.recomputes = ctx.needed.wait_for_backward(plan.reduction)
        needed_now = ctx.needed.before_backward(plan.reduction)
        loss, metrics, count, grads = linear_forward(heads, labels, plan, chunk_tokens, backend, needed_now)
        ctx.plan, ctx.chunk_tokens, ctx.backend, ctx.count = plan, chunk_tokens, backend, count
        ctx.dtypes = hidden.dtype, weight.dtype
        with torch.enable_grad():
            ctx.inputs = anchor(hidden, weight, bias) if any(ctx.needed) else None
        if ctx.recomputes:
            # a tensor from inference mode cannot be saved, its copy can
            saved = (*heads, labels)
            ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in saved))
        else:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(metrics, count)
        ctx.set_materialize_grads(False)
        return loss, metrics, count

    jvp = staticmethod(refuse_tangents)

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        refuse_transforms(grad_loss)
        nothing = (None,) * 8
        if grad_loss is None:
            return None, None, None, *nothing
        with torch.no_grad():
            if ctx.recomputes:
                *heads, labels = ctx.saved_tensors
                settings = ctx.plan, ctx.chunk_tokens, ctx.backend, ctx.needed
                grads = recomputed_gradients(Heads(*heads), labels, *settings, grad_loss.unsqueeze(-1))
                scale, in_place = grad_loss.new_ones(()), True
            else:
                grads = Gradients(*ctx.saved_tensors)
                scale = remaining_scale(grad_loss, ctx.count, ctx.plan.reduction, ctx.backend, ctx.dtypes[0])
                in_place = not retains_graph()  # else what is stored is needed again
            out = scaled_gradients(grads, scale, *ctx.dtypes, in_place=in_place)
        return *on_graph_of(out, grad_loss, ctx.inputs), *nothing


def linear_forward(
    heads: Heads, labels: Tensor, plan: Plan, chunk_tokens: int | None, backend: str, needed: NeededGradients
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Return loss (0-d or ``[N]``), sums of the metrics ``[M]``, number of valid tokens (0-d), gradients to scale."""
    tokens = valid_tokens(labels, plan.objective.ignore_index, heads.hidden.device, backend)
    rows, grads = _walk(heads, tokens, plan, chunk_tokens, backend, needed)
    loss, metrics = rows.reduce(plan.reduction, tokens.count)
    return loss, metrics, tokens.count, grads


def recomputed_gradients(
    heads: Heads,
    labels: Tensor,
    plan: Plan,
    chunk_tokens: int | None,
    backend: str,
    needed: NeededGradients,
    row_scale: Tensor,
) -> Gradients:
    """Return the gradients of Σ row_scale·loss, final, by walking the chunks again; `row_scale` ``[N, 1]``."""
    tokens = valid_tokens(labels, plan.objective.ignore_index, heads.hidden.device, backend)
    with torch.autocast(autocast_type(heads.hidden.device), enabled=False):
        return _walk(heads, tokens, plan._replace(metrics=()), chunk_tokens, backend, needed, row_scale)[1]


def scaled_gradients(
    grads: Gradients,
    scale: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Multiply those of hidden states, head and bias by the incoming one, each in its parameter's dtype."""
    return (
        None if grads.hidden is None else scaled(grads.hidden, scale, hidden_dtype, in_place),
        None if grads.weight is None else scaled(grads.weight, scale, weight_dtype, in_place),
        None if grads.bias is None else scaled(grads.bias, scale, weight_dtype, in_place),
    )


def _walk(
    heads: Heads,
    tokens: Tokens,
    plan: Plan,
    chunk_tokens: int | None,
    backend: str,
    needed: NeededGradients,
    row_scale: Tensor | None = None,
) -> tuple[Rows, Gradients]:
    """Visit all tokens, one chunk after another.

    Args:
        heads (Heads): inputs of the matrix products.
        tokens (Tokens): which to visit.
        plan (Plan): what to compute.
        chunk_tokens (int | None): C; None chooses.
        backend (str): of the loss arithmetic.
        needed (NeededGradients): gradients to compute.
        row_scale (Tensor | None): ``[N, 1]``, multiplies the gradient of each token's loss.
    """
    index, labels, count = tokens
    hidden, device, vocab, n_visited = heads.hidden, heads.hidden.device, plan.vocab, len(labels)
    dtype = working_dtype(hidden, heads.teacher_hidden)
    plan = plan._replace(want_grad=any(needed))
    rows = Rows.zeros(hidden.shape[0], plan, dtype, device)
    grads = Gradients(
        torch.zeros_like(hidden) if needed.hidden else None,
        None,
        torch.zeros(heads.weight.shape[0], dtype=dtype, device=device) if needed.bias else None,
    )
    head_grad = HeadGradient(heads.weight, vocab, one_chunk(heads, vocab, chunk_tokens)) if needed.weight else None
    if n_visited == 0:
        return rows, grads._replace(weight=None if head_grad is None else head_grad.sum)

    chunk_tokens = min(_chunk_tokens(heads, vocab, chunk_tokens, n_visited), n_visited)
    chunks = _Chunks(heads, vocab, chunk_tokens)
    block_rows = min(chunk_tokens, rows_per_block(vocab, device)) if backend == "torch" else chunk_tokens
    inside = mean_is_inside(backend, plan.reduction, hidden.dtype, device)
    block_loss = _block_loss(backend, plan, block_rows, dtype, count, inside)
    for chunk in slices(n_visited, chunk_tokens):
        pick = chunk if index is None else index[chunk]  # positions among the N tokens
        h = hidden[pick]
        student, teacher = chunks.fill(h, None if heads.teacher_hidden is None else heads.teacher_hidden[pick])
        for block in slices(len(student), block_rows):
            where = slice(chunk.start + block.start, chunk.start + block.stop)  # positions among the n tokens
            at = where if index is None else index[where]
            s = student[block]
            loss, metrics = block_loss(
                s,
                None if teacher is None else teacher[block],
                labels[where],
                s if plan.want_grad else None,
                None if row_scale is None else row_scale[at],
            )
            rows.loss[at] = loss
            for into, metric in zip(rows.metrics, metrics, strict=True):
                into[at] = metric.to(into.dtype)

        # the chunk's logits were written over by their gradient
        if grads.hidden is not None and index is None:
            torch.mm(student, chunks.weight, out=grads.hidden[pick])
        elif grads.hidden is not None:
            grads.hidden[pick] = student @ chunks.weight
        if head_grad is not None:
            head_grad.add(student, h)
        if grads.bias is not None:
            grads.bias[:vocab] += student.sum(0, dtype=dtype)
    block_loss.release()
    return rows, grads._replace(weight=None if head_grad is None else head_grad.sum)


class _Chunks:
    """Make the logits of chunks of tokens, one after another in the same memory.

    Args:
        heads (Heads): inputs of the matrix products.
        vocab (int): V, ids that both models score.
        size (int): the largest chunk.

    Attributes:
        weight (Tensor): ``[V, D]`` of the student.
    """

    def __init__(self, heads: Heads, vocab: int, size: int) -> None:
        def cut(head: Tensor | None) -> Tensor | None:
            return None if head is None else head[:vocab]

        def buffer(like: Tensor) -> Tensor:
            return like.new_empty(size, padded(vocab))

        self.weight, self._bias = heads.weight[:vocab], cut(heads.bias)
        self._teacher_weight, self._teacher_bias = cut(heads.teacher_weight), cut(heads.teacher_bias)
        self._vocab, self._student = vocab, buffer(heads.hidden)
        self._teacher = None if heads.teacher_hidden is None else buffer(heads.teacher_hidden)
        self._float8 = None
        if heads.teacher_scale is not None:
            assert heads.teacher_weight is not None and self._teacher is not None  # a head comes with hidden states
            quantised = heads.teacher_weight, heads.teacher_scale, self._teacher_bias
            self._float8 = Float8Product(*quantised, vocab, self._teacher.dtype)

    def fill(self, hidden: Tensor, teacher_hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute a chunk's logits ``[C, V]`` of both models from their hidden states ``[C, D]``."""
        student = _logits(hidden, self.weight, self._bias, self._student[: len(hidden), : self._vocab])
        if teacher_hidden is None or self._teacher is None:
            return student, None
        rows = self._teacher[: len(hidden)]
        teacher = rows[:, : self._vocab]
        if self._float8 is None:
            assert self._teacher_weight is not None  # hidden states come with a head
            _logits(teacher_hidden, self._teacher_weight, self._teacher_bias, teacher)
        else:
            self._float8(teacher_hidden, rows)
        return student, teacher


def _block_loss(backend: str, plan: Plan, max_rows: int, dtype: torch.dtype, count: Tensor, inside: bool):
    """Return the loss arithmetic of `backend`, a function of a block of logits."""
    if backend == "triton":
        from ._triton.rows import TritonBlockLoss

        return TritonBlockLoss(plan, mean_scale(count, inside))
    if backend == META:
        return MetaBlockLoss(plan, max_rows, dtype)
    return BlockLoss(plan, max_rows, dtype, count.device, mean_factor(count, inside))


def _chunk_tokens(heads: Heads, vocab: int, chunk_tokens: int | None, n_tokens: int) -> int:
    """Return the chunk size asked for, or the one chosen for `n_tokens`."""
    if chunk_tokens is not None:
        return chunk_tokens
    element_bytes = heads.hidden.element_size()
    if heads.teacher_hidden is not None:
        element_bytes += heads.teacher_hidden.element_size()
    return chunk_size(n_tokens, vocab, element_bytes, heads.hidden.device)


def one_chunk(heads: Heads, vocab: int, chunk_tokens: int | None) -> bool:
    """Return whether one chunk holds all N tokens, valid or not, which is known without their labels."""
    n_tokens = heads.hidden.shape[0]
    return _chunk_tokens(heads, vocab, chunk_tokens, n_tokens) >= n_tokens


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Compute hidden @ weight.T (+ bias) ``[C, V]``."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)
