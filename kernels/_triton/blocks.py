"""Blocks of a row's ids: how the passes load them, and what a thread keeps of those that it holds.

A pass visits whole blocks of ids without a mask, each loaded while the one before it is worked on, and the rest of the
row with one. A thread keeps statistics of the ids that it holds itself: threads first meet at the end of a pass.

Legend: G = BLOCK / GROUP groups.
"""

import triton
import triton.language as tl

# A running maximum starts here, finite, so that differences are; a row of logits from here down counts as all -inf.
LOWEST = tl.constexpr(-1.0e30)
GROUP = tl.constexpr(8)  # ids of a thread in a step, in blocks of 1024; in those of narrow rows threads share them
NO_ID = tl.constexpr(2147483647)


@triton.jit
def groups(x, WIDTH: tl.constexpr):
    """Cut a block into the ids that threads hold ``[GROUP / WIDTH, G, WIDTH]``, WIDTH neighbours as they are loaded."""
    return tl.reshape(x, [GROUP // WIDTH, x.shape[0] // GROUP, WIDTH])


@triton.jit
def group_sum(x):
    """Sum within groups ``[G]``, so that a running sum takes one register of a thread, not eight."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def group_max(x):
    """Find the maxima of groups ``[G]``."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def above(x, of_groups):
    """Subtract a number per group ``[G]`` from its ids."""
    return x - of_groups[None, :, None]


@triton.jit
def load_ids(row, offsets, stride, mask):
    """Load logits in fp32, -inf where masked out. A stride of 1 is a constant here and leaves offsets 32 bits wide."""
    if stride == 1:
        logits = tl.load(row + offsets, mask=mask, other=-float("inf"))
    else:
        logits = tl.load(row + offsets.to(tl.int64) * stride, mask=mask, other=-float("inf"))
    return logits.to(tl.float32)


@triton.jit
def load_ahead(row, start, stride, full, BLOCK: tl.constexpr):
    """Load the whole block at `start`, anything where `full`, the end of whole blocks, is reached: nobody reads it."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < full - start  # all or none, so that loads stay 128 bits wide
    if stride == 1:
        logits = tl.load(row + (start + offsets), mask=mask)
    else:
        logits = tl.load(row + (start + offsets).to(tl.int64) * stride, mask=mask)
    return logits


@triton.jit
def subtract_at_label(grad, start, ids, label, weight):
    """Subtract `weight` at the label in the one block of a row, here that at `start`, which holds it."""
    if (label >= start) & (label < start + grad.shape[0]):
        grad -= tl.where(ids == label - start, weight, 0.0)
    return grad


@triton.jit
def store_block(out, start, ids, inside, stride, values, TAIL: tl.constexpr):
    """Store the block at `start` in the dtype of `out`; only the ids `inside`, where the row ends in it (TAIL)."""
    values = values.to(out.dtype.element_ty)
    if stride == 1:
        places = out + (start + ids)
    else:
        places = out + (start + ids).to(tl.int64) * stride
    if TAIL:
        tl.store(places, values, mask=inside)
    else:
        tl.store(places, values)


@triton.jit
def fill_zeros(out, n_ids, stride, BLOCK: tl.constexpr):
    """Write the gradient of a token that is ignored."""
    zeros = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
    for start in range(0, n_ids, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(out + offsets.to(tl.int64) * stride, zeros, mask=offsets < n_ids)
