"""The kernels for the rest of a row: its ids without those that are stored of a teacher.

Stored ids are -inf in the logits that these kernels read, so that they add 0 to every sum and get the gradient 0.

Legend: N rows, V ids; T temperature, ``c = log2(e)/T``; m largest logit of the rest, ``u = s - m``. ``sums`` is
``[N, SUMS]`` in fp32: m, Σ 2^(u·c), Σ e^u, Σ e^u·u. ``terms`` is ``[N, TERMS]`` in fp32: m, the two shares, and what is
subtracted at the label. Rows are addressed as in ``row_kernels.py``.
"""

import triton
import triton.language as tl

from .blocks import load_ahead, load_ids, store_block, subtract_at_label
from .first_pass import first_pass
from .math import LOG2_E
from .row_kernels import id_in, row_start

SUMS = tl.constexpr(4)
TERMS = tl.constexpr(4)


@triton.jit(do_not_specialize=["student_inner"])
def rest_sums_kernel(
    student, sums, firsts, student_inner, student_outer_stride, student_inner_stride, student_stride, n_ids, c,
    STUDENT_AT_1: tl.constexpr, MOMENT: tl.constexpr, AGREEMENT: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum up the rest of one row in one read; m is LOWEST, and all sums are 0, where no id is left.

    Args:
        sums: receives m and Σ 2^(u·c); Σ e^u if STUDENT_AT_1, Σ e^u·u if MOMENT, which needs c = log2(e) or the former.
        firsts: ``[N]``, receives the first id at m (if AGREEMENT), or a number beyond all ids where none is left.
    """
    row = tl.program_id(0)
    s = row_start(student, row, student_inner, student_outer_stride, student_inner_stride, WIDTH)
    m, _, d, _, n, _, _, _, _, _, first, _, moment = first_pass(
        student=s, teacher=s, n_ids=n_ids, student_stride=student_stride, teacher_stride=student_stride, c=c,
        HAS_TEACHER=False, STUDENT_AT_1=STUDENT_AT_1, TEACHER_AT_1=False, FORWARD=False, REVERSE=False, RATIO=False,
        AGREEMENT=AGREEMENT, MOMENT=MOMENT, BLOCK=BLOCK, WIDTH=WIDTH,
    )  # fmt: skip
    wide_row = row.to(tl.int64)
    sums += wide_row * SUMS
    tl.store(sums, m)
    tl.store(sums + 1, d)
    if STUDENT_AT_1:
        tl.store(sums + 2, n)
    if MOMENT:
        tl.store(sums + 3, moment)
    if AGREEMENT:
        tl.store(firsts + wide_row, first)


@triton.jit
def rest_step(
    s, start, ids, inside, out, out_stride, c, m, share, share_1, label, label_weight,
    BOTH: tl.constexpr, HAS_LABEL: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block.

    Args:
        inside: ids of the row, where it ends in the block (TAIL); else unread.
    """
    u = s.to(tl.float32) - m
    grad = share * tl.exp2(u * c)
    if BOTH:
        grad += share_1 * tl.exp2(u * LOG2_E)
    if HAS_LABEL:
        grad = subtract_at_label(grad, start, ids, label, label_weight)
    store_block(out, start, ids, inside, out_stride, grad, TAIL)


@triton.jit(do_not_specialize=["student_inner", "out_inner"])
def rest_gradient_kernel(
    student, labels, terms, out,
    student_inner, student_outer_stride, student_inner_stride, student_stride,
    out_inner, out_outer_stride, out_inner_stride, out_stride, n_ids, c,
    BOTH: tl.constexpr, HAS_LABEL: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient by the rest of one row, and 0 where an id is stored.

    It is share·2^(u·c) + share_1·e^u, less the label's weight at the label.

    Args:
        labels: ``[N]`` int64; any negative number where the label is stored (if HAS_LABEL).
        out: receives the gradient; may be `student`.
        BOTH: there is a second share, of T = 1.
    """
    row = tl.program_id(0)
    s = row_start(student, row, student_inner, student_outer_stride, student_inner_stride, WIDTH)
    o = row_start(out, row, out_inner, out_outer_stride, out_inner_stride, WIDTH)
    terms += row.to(tl.int64) * TERMS
    m = tl.load(terms)
    share = tl.load(terms + 1)
    share_1 = 0.0
    label = -1
    label_weight = 0.0
    if BOTH:
        share_1 = tl.load(terms + 2)
    if HAS_LABEL:
        label = id_in(tl.load(labels + row), n_ids)
        label_weight = tl.load(terms + 3)
    ids = tl.arange(0, BLOCK)
    full = n_ids // BLOCK * BLOCK
    following = load_ahead(s, 0, student_stride, full, BLOCK)
    for start in range(0, full, BLOCK):
        block = following
        following = load_ahead(s, start + BLOCK, student_stride, full, BLOCK)
        rest_step(
            s=block, start=start, ids=ids, inside=ids, out=o, out_stride=out_stride, c=c, m=m, share=share,
            share_1=share_1, label=label, label_weight=label_weight, BOTH=BOTH, HAS_LABEL=HAS_LABEL, TAIL=False,
        )  # fmt: skip
    if full < n_ids:
        offsets = full + ids
        inside = offsets < n_ids
        block = load_ids(s, offsets, student_stride, inside)
        rest_step(
            s=block, start=full, ids=ids, inside=inside, out=o, out_stride=out_stride, c=c, m=m, share=share,
            share_1=share_1, label=label, label_weight=label_weight, BOTH=BOTH, HAS_LABEL=HAS_LABEL, TAIL=True,
        )  # fmt: skip
