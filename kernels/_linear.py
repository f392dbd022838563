"""Distillation from hidden states: the logits of either model exist one chunk of tokens at a time.

Legend: N tokens, n valid tokens, C tokens of a chunk, V vocabulary, D hidden width of the model at hand.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import Models, StudentChunks, chunk_tokens_of, one_chunk, teacher_chunks
from ._derivatives import anchor, on_graph_of, refuse_tangents, refuse_transforms
from ._meta import META
from ._plan import Plan, Rows, Tokens, autocast_type, rows_per_block, slices, valid_tokens, working_dtype
from ._scaling import mean_factor, mean_is_inside, mean_scale, remaining_scale, retains_graph, scaled
from ._sparse_checks import check_cells_of, check_not_captured
from ._teachers import CELL_KINDS, Cells, scores_of, teacher_of
from ._torch.block import BlockLoss
from ._torch.cells import CellsBlockLoss
from ._torch.head_gradient import HeadGradient
from ._torch.meta import MetaBlockLoss


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
        labels: Tensor,
        plan: Plan,
        chunk_tokens: int | None,
        backend: str,
        *teacher: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (0-d or ``[N]``), sums of the metrics ``[M]`` and number of valid tokens (0-d)."""
        models = Models(hidden, weight, bias, teacher_of(plan.teacher_kind, plan.shares, teacher))
        ctx.needed = NeededGradients(*(plan.want_grad and needed for needed in ctx.needs_input_grad[:3]))
        ctx.recomputes = ctx.needed.wait_for_backward(plan.reduction)
        needed_now = ctx.needed.before_backward(plan.reduction)
        loss, metrics, count, grads = linear_forward(models, labels, plan, chunk_tokens, backend, needed_now)
        ctx.plan, ctx.chunk_tokens, ctx.backend, ctx.count = plan, chunk_tokens, backend, count
        ctx.dtypes, ctx.undifferentiated = (hidden.dtype, weight.dtype), (None,) * (4 + len(teacher))
        with torch.enable_grad():
            ctx.inputs = anchor(hidden, weight, bias) if any(ctx.needed) else None
        if ctx.recomputes:
            # a tensor from inference mode cannot be saved, its copy can
            saved = (hidden, weight, bias, labels, *teacher)
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
        if grad_loss is None:
            return None, None, None, *ctx.undifferentiated
        with torch.no_grad():
            if ctx.recomputes:
                hidden, weight, bias, labels, *teacher = ctx.saved_tensors
                models = Models(hidden, weight, bias, teacher_of(ctx.plan.teacher_kind, ctx.plan.shares, teacher))
                settings = ctx.plan, ctx.chunk_tokens, ctx.backend, ctx.needed
                grads = recomputed_gradients(models, labels, *settings, grad_loss.unsqueeze(-1))
                scale, in_place = grad_loss.new_ones(()), True
            else:
                grads = Gradients(*ctx.saved_tensors)
                scale = remaining_scale(grad_loss, ctx.count, ctx.plan.reduction, ctx.backend, ctx.dtypes[0])
                in_place = not retains_graph()  # else what is stored is needed again
            out = scaled_gradients(grads, scale, *ctx.dtypes, in_place=in_place)
        return *on_graph_of(out, grad_loss, ctx.inputs), *ctx.undifferentiated


def linear_forward(
    models: Models, labels: Tensor, plan: Plan, chunk_tokens: int | None, backend: str, needed: NeededGradients
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Return loss (0-d or ``[N]``), sums of the metrics ``[M]``, number of valid tokens (0-d), gradients to scale."""
    tokens = _visited_tokens(models, labels, plan, backend)
    if isinstance(models.teacher, Cells):
        check_cells_of(models.teacher, tokens, plan.vocab)
    rows, grads = _walk(models, tokens, plan, chunk_tokens, backend, needed)
    loss, metrics = rows.reduce(plan.reduction, tokens.count)
    return loss, metrics, tokens.count, grads


def recomputed_gradients(
    models: Models,
    labels: Tensor,
    plan: Plan,
    chunk_tokens: int | None,
    backend: str,
    needed: NeededGradients,
    row_scale: Tensor,
) -> Gradients:
    """Return the gradients of Σ row_scale·loss, final, by walking the chunks again; `row_scale` ``[N, 1]``."""
    tokens = _visited_tokens(models, labels, plan, backend)
    with torch.autocast(autocast_type(models.hidden.device), enabled=False):
        return _walk(models, tokens, plan._replace(metrics=()), chunk_tokens, backend, needed, row_scale)[1]


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


def _visited_tokens(models: Models, labels: Tensor, plan: Plan, backend: str) -> Tokens:
    """Return the tokens to visit: with stored ids the valid ones alone, of which these have a row each."""
    if isinstance(models.teacher, Cells):
        check_not_captured(models.hidden.device)
    return valid_tokens(labels, plan.objective.ignore_index, models.hidden.device, backend)


def _walk(
    models: Models,
    tokens: Tokens,
    plan: Plan,
    chunk_tokens: int | None,
    backend: str,
    needed: NeededGradients,
    row_scale: Tensor | None = None,
) -> tuple[Rows, Gradients]:
    """Visit all tokens, one chunk after another.

    Args:
        models (Models): factors of the student's logits, and the teacher.
        tokens (Tokens): which to visit.
        plan (Plan): what to compute.
        chunk_tokens (int | None): C; None chooses.
        backend (str): of the loss arithmetic.
        needed (NeededGradients): gradients to compute.
        row_scale (Tensor | None): ``[N, 1]``, multiplies the gradient of each token's loss.
    """
    index, labels, count = tokens
    hidden, device, vocab, n_visited = models.hidden, models.hidden.device, plan.vocab, len(labels)
    dtype = working_dtype(hidden, *scores_of(models.teacher))
    plan = plan._replace(want_grad=any(needed))
    rows = Rows.zeros(hidden.shape[0], plan, dtype, device)
    grads = Gradients(
        torch.zeros_like(hidden) if needed.hidden else None,
        None,
        torch.zeros(models.weight.shape[0], dtype=dtype, device=device) if needed.bias else None,
    )
    head_grad = HeadGradient(models.weight, vocab, one_chunk(models, vocab, chunk_tokens)) if needed.weight else None
    if n_visited == 0:
        return rows, grads._replace(weight=None if head_grad is None else head_grad.sum)

    chunk_tokens = min(chunk_tokens_of(models, vocab, chunk_tokens, n_visited), n_visited)
    chunks, teacher = StudentChunks(models, vocab, chunk_tokens), teacher_chunks(models, vocab, chunk_tokens)
    block_rows = min(chunk_tokens, _rows_per_block(backend, models, vocab))
    inside = mean_is_inside(backend, plan.reduction, hidden.dtype, device)
    block_loss = _block_loss(backend, plan, block_rows, dtype, count, inside)
    for chunk in slices(n_visited, chunk_tokens):
        pick = chunk if index is None else index[chunk]  # positions among the N tokens
        h = hidden[pick]
        student = chunks.fill(h)
        teacher.fill(pick)
        for block in slices(len(student), block_rows):
            where = slice(chunk.start + block.start, chunk.start + block.stop)  # positions among the n tokens
            at = where if index is None else index[where]
            s = student[block]
            loss, metrics = block_loss(
                s,
                teacher.rows(block, where),  # pyright: ignore[reportArgumentType]: each kind has its arithmetic
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


def _rows_per_block(backend: str, models: Models, vocab: int) -> int:
    """Return how many rows of a chunk the loss arithmetic takes at a time: as many as its temporaries allow.

    Those of PyTorch's arithmetic are as wide as the vocabulary. Triton's kernels have none and take any number of rows;
    beside stored ids they are k + 1 wide. :data:`META` goes Triton's way, and cuts PyTorch's workspace itself.
    """
    device, teacher = models.hidden.device, models.teacher
    if backend == "torch":
        return rows_per_block(vocab, device)
    # temporaries are as wide as the cells, which may be as many as the vocabulary has ids
    return rows_per_block(teacher.ids.shape[1] + 1, device) if isinstance(teacher, Cells) else sys.maxsize


def _block_loss(backend: str, plan: Plan, max_rows: int, dtype: torch.dtype, count: Tensor, inside: bool):
    """Return the loss arithmetic of `backend`, a function of a block of logits."""
    stored = plan.teacher_kind in CELL_KINDS
    if backend == "triton" and stored:
        from ._triton.cells import TritonCellsBlockLoss

        return TritonCellsBlockLoss(plan, mean_scale(count, inside))
    if backend == "triton":
        from ._triton.rows import TritonBlockLoss

        return TritonBlockLoss(plan, mean_scale(count, inside))
    if backend == META:
        return MetaBlockLoss(plan, max_rows, dtype)
    kind = CellsBlockLoss if stored else BlockLoss
    return kind(plan, max_rows, dtype, count.device, mean_factor(count, inside))
