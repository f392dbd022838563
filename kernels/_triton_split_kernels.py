"""The kernels for rows that lie in parts: split over several programs, or over the processes of a group.

What ``rows_kernel`` does at one go is cut where all parts of a row have to be known: statistics of each part, their
merger, a second (and third) walk over each part with the whole row's statistics, and the row's results.

Legend: N rows, V ids, P parts of a row on this device. ``parts`` is ``[N, P, COLUMNS]`` and ``merged``
``[N, COLUMNS]`` in fp32: m_s, m_t, the largest finite (s - t)·c, which merge by their maximum; then d_s, d_t, n_s,
n_t, forward, reverse, ruled_out of ``_triton_passes.statistics`` and the label's two logits, which merge by sums.
``terms`` is ``[N, P, TERMS]`` in fp32, the sums that ``_triton_passes.finish`` returns; ``firsts`` ``[N, P, 2]``
in int32. Tensors that grow with N start at the first row of the launch.
"""

import triton
import triton.language as tl

from ._triton_kernels import RESULTS, id_in, kl_value, load_logit, row_start, store_results, store_zeros
from ._triton_math import LOG2_E
from ._triton_passes import (
    LOWEST,
    NO_ID,
    centre_of,
    cross_entropy,
    fill_zeros,
    finish,
    kl_from_statistics,
    move_of,
    moved_forward,
    moved_reverse,
    statistics,
)

COLUMNS = tl.constexpr(12)
MAXIMA = tl.constexpr(3)  # the leading columns
TERMS = tl.constexpr(7)
LABEL_LOGITS = 10  # the first of the two columns

_GROWING = ["first_row", "student_inner", "teacher_inner", "out_inner"]


@triton.jit
def store_statistics(to, m_s, m_t, top, d_s, d_t, n_s, n_t, forward, reverse, ruled_out, label_s, label_t):
    """In the order of the legend."""
    tl.store(to, m_s)
    tl.store(to + 1, m_t)
    tl.store(to + 2, top)
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
    """In the order of the legend, without the label's logits."""
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9),
    )  # fmt: skip


@triton.jit(do_not_specialize=_GROWING)
def statistics_kernel(
    student, teacher, labels, parts, first_row,
    student_inner, student_outer_stride, student_inner_stride, student_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride, teacher_stride,
    n_ids, part_ids, ignore_index, c,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, AT_1: tl.constexpr,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of part ``program_id(1)`` of a row; of one with an ignored label those of no id at all.

    Args:
        part_ids: ids of a part, but for the last one.
        FORWARD: whether Σ 2^ut·(ut - us) is summed, see ``_triton_passes.statistics``.
    """
    local, part = tl.program_id(0), tl.program_id(1)
    to = parts + (local.to(tl.int64) * tl.num_programs(1) + part) * COLUMNS
    row, start = first_row + local, part * part_ids
    n_part = tl.minimum(part_ids, n_ids - start)
    s = row_start(student, row, student_inner, student_outer_stride, student_inner_stride)
    t = row_start(teacher, row, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    s += start.to(tl.int64) * student_stride
    t += start.to(tl.int64) * teacher_stride
    label_s = 0.0
    label_t = 0.0
    if HAS_LABELS:
        label = tl.load(labels + local)
        if label == ignore_index:
            store_statistics(to, LOWEST, LOWEST, LOWEST, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            return
        label = id_in(label, start, n_part)
        label_s = load_logit(s, label, student_stride, 0.0)
        if HAS_TEACHER:
            label_t = load_logit(t, label, teacher_stride, 0.0)
    m_s, m_t, d_s, d_t, n_s, n_t, forward, reverse, ruled_out, top = statistics(
        s, t, n_part, student_stride, teacher_stride, c, HAS_TEACHER, AT_1, FORWARD,
        DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl", BLOCK,
    )  # fmt: skip
    top = tl.where(top > LOWEST, top + (m_s - m_t) * c, LOWEST)
    store_statistics(to, m_s, m_t, top, d_s, d_t, n_s, n_t, forward, reverse, ruled_out, label_s, label_t)


@triton.jit
def merge_kernel(parts, maxima, merged, c, HAS_MAXIMA: tl.constexpr, PARTS: tl.constexpr):
    """``merged`` of one row from its PARTS parts, relative to ``maxima`` ``[N, MAXIMA]`` or (not HAS_MAXIMA) theirs."""
    row = tl.program_id(0).to(tl.int64)
    parts += row * PARTS * COLUMNS
    m_s = LOWEST
    m_t = LOWEST
    top = LOWEST
    if HAS_MAXIMA:
        m_s = tl.load(maxima + row * MAXIMA)
        m_t = tl.load(maxima + row * MAXIMA + 1)
        top = tl.load(maxima + row * MAXIMA + 2)
    else:
        for part in range(PARTS):
            m_s = tl.maximum(m_s, tl.load(parts + part * COLUMNS))
            m_t = tl.maximum(m_t, tl.load(parts + part * COLUMNS + 1))
            top = tl.maximum(top, tl.load(parts + part * COLUMNS + 2))
    d_s = 0.0
    d_t = 0.0
    n_s = 0.0
    n_t = 0.0
    forward = 0.0
    reverse = 0.0
    ruled_out = 0.0
    label_s = 0.0
    label_t = 0.0
    for part in range(PARTS):
        at = parts + part * COLUMNS
        own_s, own_t, _, part_s, part_t, part_n_s, part_n_t, part_forward, part_reverse, part_out = load_statistics(at)
        move_s = move_of(own_s, m_s, c)
        move_t = move_of(own_t, m_t, c)
        forward += moved_forward(part_forward, part_t, move_s, move_t)
        reverse += moved_reverse(part_reverse, part_s, part_out, move_s, move_t)
        d_s += tl.exp2(move_s) * part_s
        d_t += tl.exp2(move_t) * part_t
        ruled_out += tl.exp2(move_s) * part_out
        n_s += tl.exp2(move_of(own_s, m_s, LOG2_E)) * part_n_s
        n_t += tl.exp2(move_of(own_t, m_t, LOG2_E)) * part_n_t
        label_s += tl.load(at + 10)
        label_t += tl.load(at + 11)
    to = merged + row * COLUMNS
    store_statistics(to, m_s, m_t, top, d_s, d_t, n_s, n_t, forward, reverse, ruled_out, label_s, label_t)


@triton.jit
def centre_and_limit(
    DIVERGENCE: tl.constexpr, c, m_s, m_t, top, d_s, d_t, forward, reverse, ruled_out, sums, HAS_SUMS: tl.constexpr
):  # fmt: skip
    """What the gradient needs of the whole row: from the statistics, or (HAS_SUMS) from the row's ``terms``."""
    _, _, centre, limit = kl_from_statistics(d_s, d_t, forward, reverse, ruled_out, top - (m_s - m_t) * c)
    if HAS_SUMS:
        centre = centre_of(DIVERGENCE, tl.load(sums + 1), tl.load(sums + 2))
    return centre, limit


@triton.jit(do_not_specialize=_GROWING)
def finish_kernel(
    student, teacher, labels, out, merged, sums, terms, firsts, row_scale, first_row,
    student_inner, student_outer_stride, student_inner_stride, student_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride, teacher_stride,
    out_inner, out_outer_stride, out_inner_stride, out_stride, scale_stride,
    n_ids, part_ids, ignore_index, c, beta, rest, kd_slope, ce_weight,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr,
    HAS_LABELS: tl.constexpr, AT_1: tl.constexpr, METRICS: tl.constexpr, HAS_SUMS: tl.constexpr,
    HAS_TERMS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A further walk over part ``program_id(1)`` of a row; ``out`` as for ``rows_kernel``.

    Args:
        sums: ``[N, TERMS]``, the row's terms from a walk before (if HAS_SUMS).
        terms, firsts: receive the part's (if HAS_TERMS).
    """
    local, part = tl.program_id(0), tl.program_id(1)
    row, start = first_row + local, part * part_ids
    n_part = tl.minimum(part_ids, n_ids - start)
    s = row_start(student, row, student_inner, student_outer_stride, student_inner_stride)
    t = row_start(teacher, row, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    o = row_start(out, row, out_inner, out_outer_stride, out_inner_stride)
    s += start.to(tl.int64) * student_stride
    t += start.to(tl.int64) * teacher_stride
    o += start.to(tl.int64) * out_stride
    to = local.to(tl.int64) * tl.num_programs(1) + part
    label = -1
    if HAS_LABELS:
        label = tl.load(labels + local)
        if label == ignore_index:
            if GRADIENT:
                fill_zeros(o, n_part, out_stride, BLOCK)
            if HAS_TERMS:
                for i in tl.static_range(TERMS):
                    tl.store(terms + to * TERMS + i, 0.0)
                tl.store(firsts + to * 2, NO_ID)
                tl.store(firsts + to * 2 + 1, NO_ID)
            return
        label = id_in(label, start, n_part)
    m_s, m_t, top, d_s, d_t, n_s, n_t, forward, reverse, ruled_out = load_statistics(
        merged + local.to(tl.int64) * COLUMNS
    )
    if not AT_1:
        n_s = d_s
        n_t = d_t
    centre = 0.0
    limit = 0.0
    if HAS_KD:
        centre, limit = centre_and_limit(
            DIVERGENCE, c, m_s, m_t, top, d_s, d_t, forward, reverse, ruled_out,
            sums + local.to(tl.int64) * TERMS, HAS_SUMS,
        )  # fmt: skip
    scale = 1.0
    if GRADIENT:
        scale = tl.load(row_scale + row.to(tl.int64) * scale_stride).to(tl.float32)
    value, centres, mass, kl, entropy_s, entropy_t, acceptance, first_s, first_t = finish(
        s, t, o, n_part, student_stride, teacher_stride, out_stride, c, beta, rest, label,
        m_s, m_t, d_s, d_t, n_s, n_t, centre, limit, kd_slope * scale, ce_weight * scale,
        DIVERGENCE, HAS_TEACHER, HAS_KD, HAS_CE, AT_1, METRICS, HAS_TERMS, GRADIENT, False, BLOCK,
    )  # fmt: skip
    if HAS_TERMS:
        terms += to * TERMS
        tl.store(terms, value)
        tl.store(terms + 1, centres)
        tl.store(terms + 2, mass)
        tl.store(terms + 3, kl)
        tl.store(terms + 4, entropy_s)
        tl.store(terms + 5, entropy_t)
        tl.store(terms + 6, acceptance)
        tl.store(firsts + to * 2, tl.where(first_s < NO_ID, first_s + start, NO_ID))
        tl.store(firsts + to * 2 + 1, tl.where(first_t < NO_ID, first_t + start, NO_ID))


@triton.jit
def results_kernel(
    merged, sums, firsts, labels, results, n_ids, ignore_index, c, beta, rest, kd_ratio, kd_scale, ce_weight,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_KD: tl.constexpr, HAS_LABELS: tl.constexpr,
    AT_1: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """``results`` of ``rows_kernel`` for one row: the values from its terms if HAS_SUMS, else from its statistics."""
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
        inside = (label >= 0) & (label < n_ids)
        label_s = tl.where(inside, tl.load(merged + 10), float("nan"))
        label_t = tl.where(inside, tl.load(merged + 11), float("nan"))
    m_s, m_t, top, d_s, d_t, n_s, n_t, forward, reverse, ruled_out = load_statistics(merged)
    if not AT_1:
        n_s = d_s
        n_t = d_t
    divergence = 0.0
    kl = 0.0
    agreement = 0.0
    entropy_s = 0.0
    entropy_t = 0.0
    acceptance = 0.0
    if HAS_SUMS:
        divergence = tl.load(sums)
        kl = tl.load(sums + 3)
        entropy_s = tl.load(sums + 4)
        entropy_t = tl.load(sums + 5)
        acceptance = tl.load(sums + 6)
        agreement = tl.where(tl.load(firsts + row * 2) == tl.load(firsts + row * 2 + 1), 1.0, 0.0)
    elif HAS_KD:
        forward_kl, reverse_kl, _, _ = kl_from_statistics(d_s, d_t, forward, reverse, ruled_out, top - (m_s - m_t) * c)
        divergence = kl_value(DIVERGENCE, beta, rest, forward_kl, reverse_kl)
    store_results(
        results, kd_ratio, kd_scale, ce_weight, cross_entropy(label_s, m_s, n_s), cross_entropy(label_t, m_t, n_t),
        divergence, kl, agreement, entropy_s, entropy_t, acceptance,
    )  # fmt: skip
