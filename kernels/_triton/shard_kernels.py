"""The kernels for rows whose ids are sharded over the processes of a group.

What ``rows_kernel`` does at one go is cut where the whole row has to be known: statistics of a shard, their rescaling
to the maxima of all shards, a second (and third) pass with the whole row's statistics, and the row's results.

Legend: N rows, V ids of this shard. ``own`` and ``merged`` are ``[N, COLUMNS]`` in fp32: m_s, m_t, the largest finite
s - t, which merge by their maximum; then d_s, d_t, n_s, n_t, forward, reverse, ruled_out of
``first_pass`` and the label's two logits, which merge by sums. ``terms`` is ``[N, TERMS]`` in fp32, the
sums that ``second_pass`` returns; ``firsts`` ``[N, 2]`` in int32.
"""

import triton
import triton.language as tl

from .blocks import LOWEST, NO_ID, fill_zeros
from .first_pass import first_pass, kl_from_statistics, move_of, moved_forward, moved_reverse
from .math import LOG2_E, cross_entropy, infinite_where
from .row_kernels import RESULTS, id_in, kl_value, row_start, store_first_results, store_results, store_zeros
from .second_pass import centre_of, second_pass

COLUMNS = tl.constexpr(12)
MAXIMA = tl.constexpr(3)  # the leading columns
TERMS = tl.constexpr(7)
LABEL_LOGITS = tl.constexpr(10)  # the first of the two columns

_GROWING = ["student_inner", "teacher_inner", "out_inner"]


@triton.jit
def store_statistics(to, m_s, m_t, largest_ratio, d_s, d_t, n_s, n_t, forward, reverse, ruled_out, label_s, label_t):
    """Store a row's statistics in the order of the legend."""
    tl.store(to, m_s)
    tl.store(to + 1, m_t)
    tl.store(to + 2, largest_ratio)
    tl.store(to + 3, d_s)
    tl.store(to + 4, d_t)
    tl.store(to + 5, n_s)
    tl.store(to + 6, n_t)
    tl.store(to + 7, forward)
    tl.store(to + 8, reverse)
    tl.store(to + 9, ruled_out)
    tl.store(to + 10, label_s)
    tl.store(to + 11, label_t)


@triton.jit
def load_statistics(at):
    """Load a row's statistics in the order of the legend, without the label's logits."""
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9),
    )  # fmt: skip


@triton.jit(do_not_specialize=_GROWING)
def first_pass_kernel(
    student, teacher, labels, own, firsts,
    student_inner, student_outer_stride, student_inner_stride, student_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride, teacher_stride,
    n_ids, ignore_index, c,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, STUDENT_AT_1: tl.constexpr,
    TEACHER_AT_1: tl.constexpr, FORWARD: tl.constexpr, AGREEMENT: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of this shard of a row, without the label's logits; for an ignored label those of no id.

    Args:
        firsts: receives the first ids at the shard's maxima (if AGREEMENT).
        FORWARD: whether Σ 2^ut·(ut - us) is summed, see ``first_pass``.
    """
    row = tl.program_id(0)
    to = own + row.to(tl.int64) * COLUMNS
    s = row_start(student, row, student_inner, student_outer_stride, student_inner_stride, WIDTH)
    t = row_start(teacher, row, teacher_inner, teacher_outer_stride, teacher_inner_stride, WIDTH)
    if HAS_LABELS:
        label = tl.load(labels + row)
        if label == ignore_index:
            store_statistics(
                to=to, m_s=LOWEST, m_t=LOWEST, largest_ratio=LOWEST, d_s=0.0, d_t=0.0, n_s=0.0, n_t=0.0,
                forward=0.0, reverse=0.0, ruled_out=0.0, label_s=0.0, label_t=0.0,
            )  # fmt: skip
            if AGREEMENT:
                tl.store(firsts + row.to(tl.int64) * 2, NO_ID)
                tl.store(firsts + row.to(tl.int64) * 2 + 1, NO_ID)
            return
    m_s, m_t, d_s, d_t, n_s, n_t, forward, reverse, ruled_out, largest_ratio, first_s, first_t, _ = first_pass(
        student=s, teacher=t, n_ids=n_ids, student_stride=student_stride, teacher_stride=teacher_stride, c=c,
        HAS_TEACHER=HAS_TEACHER, STUDENT_AT_1=STUDENT_AT_1, TEACHER_AT_1=TEACHER_AT_1, FORWARD=FORWARD,
        REVERSE=DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl", RATIO=True, AGREEMENT=AGREEMENT,
        MOMENT=False, BLOCK=BLOCK, WIDTH=WIDTH,
    )  # fmt: skip
    if AGREEMENT:
        tl.store(firsts + row.to(tl.int64) * 2, first_s)
        tl.store(firsts + row.to(tl.int64) * 2 + 1, first_t)
    largest_ratio = tl.where(largest_ratio > LOWEST, largest_ratio + (m_s - m_t), LOWEST)
    store_statistics(
        to=to, m_s=m_s, m_t=m_t, largest_ratio=largest_ratio, d_s=d_s, d_t=d_t, n_s=n_s, n_t=n_t,
        forward=forward, reverse=reverse, ruled_out=ruled_out, label_s=0.0, label_t=0.0,
    )  # fmt: skip


@triton.jit
def rescale_kernel(own, maxima, merged, c):
    """Rescale one row's ``own`` to ``maxima`` ``[N, MAXIMA]``, which makes it a summand of ``merged``."""
    row = tl.program_id(0).to(tl.int64)
    maxima += row * MAXIMA
    m_s = tl.load(maxima)
    m_t = tl.load(maxima + 1)
    largest_ratio = tl.load(maxima + 2)
    own_s, own_t, _, d_s, d_t, n_s, n_t, forward, reverse, ruled_out = load_statistics(own + row * COLUMNS)
    move_s = move_of(own_s, m_s)
    move_t = move_of(own_t, m_t)
    factor_s = tl.exp2(move_s * c)
    factor_t = tl.exp2(move_t * c)
    store_statistics(
        to=merged + row * COLUMNS, m_s=m_s, m_t=m_t, largest_ratio=largest_ratio,
        d_s=factor_s * d_s, d_t=factor_t * d_t,
        n_s=tl.exp2(move_s * LOG2_E) * n_s, n_t=tl.exp2(move_t * LOG2_E) * n_t,
        forward=moved_forward(forward, d_t, factor_t, move_s, move_t),
        reverse=moved_reverse(reverse, d_s - ruled_out, factor_s, move_s, move_t),
        ruled_out=factor_s * ruled_out, label_s=0.0, label_t=0.0,
    )  # fmt: skip


@triton.jit
def centre_and_limit(
    DIVERGENCE: tl.constexpr, c, m_s, m_t, largest_ratio, d_s, d_t, forward, reverse, ruled_out, sums,
    HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Return what the gradient needs of the whole row: from the statistics, or (HAS_SUMS) from its ``terms``."""
    largest = largest_ratio - (m_s - m_t)
    _, _, centre, limit = kl_from_statistics(c, d_s, d_t, forward, reverse, ruled_out, largest)
    if HAS_SUMS:
        centre = centre_of(DIVERGENCE, tl.load(sums + 1), tl.load(sums + 2))
    return centre, limit


@triton.jit(do_not_specialize=_GROWING)
def second_pass_kernel(
    student, teacher, labels, out, merged, sums, terms, row_scale,
    student_inner, student_outer_stride, student_inner_stride, student_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride, teacher_stride,
    out_inner, out_outer_stride, out_inner_stride, out_stride, scale_stride,
    n_ids, ignore_index, c, beta, one_minus_beta, kd_slope, ce_weight,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr,
    HAS_LABELS: tl.constexpr, STUDENT_AT_1: tl.constexpr, TEACHER_AT_1: tl.constexpr, KL: tl.constexpr,
    ENTROPIES: tl.constexpr, ACCEPTANCE: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_TERMS: tl.constexpr,
    GRADIENT: tl.constexpr, BETA_ABOVE_HALF: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Make a further pass over this shard of a row; ``out`` as for ``rows_kernel``.

    Args:
        labels: ``[N]``, ids of this shard; any negative number where the label lies in another.
        sums: ``[N, TERMS]``, the row's terms from a pass before (if HAS_SUMS).
        terms: receives the shard's (if HAS_TERMS).
    """
    row = tl.program_id(0)
    wide_row = row.to(tl.int64)
    s = row_start(student, row, student_inner, student_outer_stride, student_inner_stride, WIDTH)
    t = row_start(teacher, row, teacher_inner, teacher_outer_stride, teacher_inner_stride, WIDTH)
    o = row_start(out, row, out_inner, out_outer_stride, out_inner_stride, WIDTH)
    label = -1
    if HAS_LABELS:
        label = tl.load(labels + row)
        if label == ignore_index:
            if GRADIENT:
                fill_zeros(o, n_ids, out_stride, BLOCK)
            if HAS_TERMS:
                for i in tl.static_range(TERMS):
                    tl.store(terms + wide_row * TERMS + i, 0.0)
            return
        label = id_in(label, n_ids)
    merged += wide_row * COLUMNS
    m_s, m_t, largest_ratio, d_s, d_t, n_s, n_t, forward, reverse, ruled_out = load_statistics(merged)
    if not STUDENT_AT_1:
        n_s = d_s
    if not TEACHER_AT_1:
        n_t = d_t
    centre = 0.0
    limit = 0.0
    if HAS_KD:
        centre, limit = centre_and_limit(
            DIVERGENCE=DIVERGENCE, c=c, m_s=m_s, m_t=m_t, largest_ratio=largest_ratio, d_s=d_s, d_t=d_t,
            forward=forward, reverse=reverse, ruled_out=ruled_out, sums=sums + wide_row * TERMS, HAS_SUMS=HAS_SUMS,
        )  # fmt: skip
    scale = 1.0
    if GRADIENT:
        scale = tl.load(row_scale + wide_row * scale_stride).to(tl.float32)
    value, centres, mass, kl, entropy_s, entropy_t, acceptance = second_pass(
        student=s, teacher=t, out=o, n_ids=n_ids, student_stride=student_stride, teacher_stride=teacher_stride,
        out_stride=out_stride, c=c, beta=beta, one_minus_beta=one_minus_beta, label=label,
        m_s=m_s, m_t=m_t, d_s=d_s, d_t=d_t, n_s=n_s, n_t=n_t, centre=centre, limit=limit,
        kd_weight=kd_slope * scale, ce_weight=ce_weight * scale,
        DIVERGENCE=DIVERGENCE, HAS_TEACHER=HAS_TEACHER, HAS_KD=HAS_KD, HAS_CE=HAS_CE, STUDENT_AT_1=STUDENT_AT_1,
        TEACHER_AT_1=TEACHER_AT_1, KL=KL, ENTROPIES=ENTROPIES, ACCEPTANCE=ACCEPTANCE, TERMS=HAS_TERMS,
        GRADIENT=GRADIENT, BETA_ABOVE_HALF=BETA_ABOVE_HALF, APPROXIMATE=APPROXIMATE, BLOCK=BLOCK, WIDTH=WIDTH,
    )  # fmt: skip
    if HAS_TERMS:
        terms += wide_row * TERMS
        tl.store(terms, value)
        tl.store(terms + 1, centres)
        tl.store(terms + 2, mass)
        tl.store(terms + 3, kl)
        tl.store(terms + 4, entropy_s)
        tl.store(terms + 5, entropy_t)
        tl.store(terms + 6, acceptance)


@triton.jit
def results_kernel(
    merged, sums, firsts, labels, results, ignore_index, c, beta, one_minus_beta, kd_ratio, kd_scale, ce_weight,
    DIVERGENCE: tl.constexpr, HAS_KD: tl.constexpr, HAS_LABELS: tl.constexpr, STUDENT_AT_1: tl.constexpr,
    TEACHER_AT_1: tl.constexpr, AGREEMENT: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Make ``results`` of ``rows_kernel`` for one row: from its terms if HAS_SUMS, else from its statistics."""
    row = tl.program_id(0).to(tl.int64)
    results += row * RESULTS
    merged += row * COLUMNS
    sums += row * TERMS
    label_s = 0.0
    label_t = 0.0
    if HAS_LABELS:
        label = tl.load(labels + row)
        if label == ignore_index:
            store_zeros(results)
            return
        label_s = tl.where(label >= 0, tl.load(merged + LABEL_LOGITS), float("nan"))
        label_t = tl.where(label >= 0, tl.load(merged + LABEL_LOGITS + 1), float("nan"))
    m_s, m_t, largest_ratio, d_s, d_t, n_s, n_t, forward, reverse, ruled_out = load_statistics(merged)
    if not STUDENT_AT_1:
        n_s = d_s
    if not TEACHER_AT_1:
        n_t = d_t
    divergence = 0.0
    kl = 0.0
    agreement = 0.0
    entropy_s = 0.0
    entropy_t = 0.0
    acceptance = 0.0
    if AGREEMENT:
        agreement = tl.where(tl.load(firsts + row * 2) == tl.load(firsts + row * 2 + 1), 1.0, 0.0)
    if HAS_SUMS:
        divergence = infinite_where(ruled_out > 0.0, tl.load(sums))
        kl = tl.load(sums + 3)
        entropy_s = tl.load(sums + 4)
        entropy_t = tl.load(sums + 5)
        acceptance = tl.load(sums + 6)
    elif HAS_KD:
        largest = largest_ratio - (m_s - m_t)
        forward_kl, reverse_kl, _, _ = kl_from_statistics(c, d_s, d_t, forward, reverse, ruled_out, largest)
        divergence = kl_value(DIVERGENCE, beta, one_minus_beta, forward_kl, reverse_kl)
    class_loss = cross_entropy(label_s, m_s, n_s)
    store_first_results(results, class_loss, cross_entropy(label_t, m_t, n_t), agreement)
    store_results(
        results=results, kd_ratio=kd_ratio, kd_scale=kd_scale, ce_weight=ce_weight, class_loss=class_loss,
        divergence=divergence, kl=kl, entropy_s=entropy_s, entropy_t=entropy_t, acceptance=acceptance,
    )  # fmt: skip
