"""The first pass over a row of logits, which sums exponentials, and what its statistics tell.

Device functions: one kernel calls both passes for a whole row, other kernels one of them for a shard of a row.

Legend: V ids of the row (or of its shard); T temperature, ``c = log2(e)/T``; ``m_s``, ``m_t`` largest raw logits;
``us = s - m_s``; G groups of ids, see ``blocks.py``; for other names see ``math.py``.
"""

import triton
import triton.language as tl

from .._objective import BEYOND_FINITE as _BEYOND_FINITE
from .blocks import GROUP, LOWEST, NO_ID, above, group_max, group_sum, groups, load_ahead, load_ids
from .math import HUGE, LN2, LOG2_E, gap_of, infinite_where, weighted

BEYOND_FINITE = tl.constexpr(_BEYOND_FINITE)


@triton.jit
def move_of(old, new):
    """Return by how much logits fall when the maximum they are relative to rises; 0 where nothing finite was seen."""
    return tl.where(old > LOWEST, old - new, 0.0)


@triton.jit
def moved_forward(forward, d_t, factor_t, move_s, move_t):
    """Rescale ``forward`` of ``first_pass`` to new maxima; README.md derives it and the next."""
    return weighted(factor_t, forward + d_t * (move_t - move_s))


@triton.jit
def moved_reverse(reverse, d_s, factor_s, move_s, move_t):
    """Rescale ``reverse`` of ``first_pass`` to new maxima; `d_s` without what the teacher rules out, if anything."""
    return factor_s * (reverse - d_s * (move_t - move_s))


@triton.jit
def moved_moment(moment, d, factor, move):
    """Rescale ``moment`` of ``first_pass`` to a new maximum."""
    return factor * (moment + d * move)


@triton.jit
def first_step(
    s, t, start, inside, m_s, m_t, d_s, d_t, n_s, n_t, forward, reverse, largest_ratio, step_s, step_t, moment, c,
    HAS_TEACHER: tl.constexpr, STUDENT_AT_1: tl.constexpr, TEACHER_AT_1: tl.constexpr, FORWARD: tl.constexpr,
    REVERSE: tl.constexpr, RATIO: tl.constexpr, AGREEMENT: tl.constexpr, MOMENT: tl.constexpr, TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Take one block into the statistics of its groups, each ``[G]`` and relative to the group's own maxima.

    Args:
        inside: ids of the row, where it ends in the block (TAIL); else unread.
    """
    s = groups(s.to(tl.float32), WIDTH)
    block_s = group_max(s)
    new_s = tl.maximum(m_s, block_s)
    us = above(s, new_s)
    e_s = tl.exp2(us * c)
    move_s = m_s - new_s
    factor_s = tl.exp2(move_s * c)
    e_1 = e_s
    d_1 = d_s
    factor_1 = factor_s
    if STUDENT_AT_1:
        e_1 = tl.exp2(us * LOG2_E)
        d_1 = n_s
        factor_1 = tl.exp2(move_s * LOG2_E)
        n_s = n_s * factor_1 + group_sum(e_1)
    if MOMENT:
        moment = moved_moment(moment, d_1, factor_1, move_s) + group_sum(e_1 * tl.maximum(us, -HUGE))
    if AGREEMENT:
        step_s = tl.where(block_s > m_s, start, step_s)
    if HAS_TEACHER:
        t = groups(t.to(tl.float32), WIDTH)
        block_t = group_max(t)
        new_t = tl.maximum(m_t, block_t)
        ut = above(t, new_t)
        e_t = tl.exp2(ut * c)
        move_t = m_t - new_t
        factor_t = tl.exp2(move_t * c)
        if FORWARD:
            forward = moved_forward(forward, d_t, factor_t, move_s, move_t) + group_sum(weighted(e_t, ut - us))
        if REVERSE:
            ratio = us - ut  # not finite where an id is masked in either model, and then the sum is not
            if TAIL:
                ratio = tl.where(groups(inside, WIDTH), ratio, -HUGE)
            reverse = moved_reverse(reverse, d_s, factor_s, move_s, move_t) + group_sum(e_s * ratio)
            if RATIO:
                shifted = tl.where((m_s > LOWEST) & (m_t > LOWEST), largest_ratio - (move_t - move_s), LOWEST)
                largest_ratio = tl.maximum(shifted, group_max(ratio))
        if TEACHER_AT_1:
            n_t = n_t * tl.exp2(move_t * LOG2_E) + group_sum(tl.exp2(ut * LOG2_E))
        if AGREEMENT:
            step_t = tl.where(block_t > m_t, start, step_t)
        d_t = d_t * factor_t + group_sum(e_t)
        m_t = new_t
    d_s = d_s * factor_s + group_sum(e_s)
    return new_s, m_t, d_s, d_t, n_s, n_t, forward, reverse, largest_ratio, step_s, step_t, moment


@triton.jit
def first_pass(
    student, teacher, n_ids, student_stride, teacher_stride, c,
    HAS_TEACHER: tl.constexpr, STUDENT_AT_1: tl.constexpr, TEACHER_AT_1: tl.constexpr, FORWARD: tl.constexpr,
    REVERSE: tl.constexpr, RATIO: tl.constexpr, AGREEMENT: tl.constexpr, MOMENT: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Read both rows once, and compute the statistics that need no probability.

    Returns:
        m_s, m_t;
        d_s = Σ 2^(us·c), d_t = Σ 2^(ut·c);
        n_s (if STUDENT_AT_1), n_t (if TEACHER_AT_1): the same at T = 1;
        forward = Σ 2^(ut·c)·(ut - us) (if FORWARD);
        and if REVERSE: reverse = Σ 2^(us·c)·(us - ut) without the ids that the teacher rules out,
        ruled_out = Σ 2^(us·c) over those, largest_ratio = the largest finite us - ut, if RATIO or there are such;
        if AGREEMENT: the first ids at m_s and at m_t;
        moment = Σ e^us·us (if MOMENT, and then c is log2(e) or STUDENT_AT_1).
    """
    m_s = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    m_t = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    d_s = tl.zeros([BLOCK // GROUP], tl.float32)
    d_t = tl.zeros([BLOCK // GROUP], tl.float32)
    n_s = tl.zeros([BLOCK // GROUP], tl.float32)
    n_t = tl.zeros([BLOCK // GROUP], tl.float32)
    forward = tl.zeros([BLOCK // GROUP], tl.float32)
    reverse = tl.zeros([BLOCK // GROUP], tl.float32)
    largest_ratio = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    step_s = tl.zeros([BLOCK // GROUP], tl.int32)
    step_t = tl.zeros([BLOCK // GROUP], tl.int32)
    moment = tl.zeros([BLOCK // GROUP], tl.float32)
    ids = tl.arange(0, BLOCK)
    full = n_ids // BLOCK * BLOCK
    next_s = load_ahead(student, 0, student_stride, full, BLOCK)
    next_t = next_s
    if HAS_TEACHER:
        next_t = load_ahead(teacher, 0, teacher_stride, full, BLOCK)
    for start in range(0, full, BLOCK):
        s = next_s
        t = next_t
        next_s = load_ahead(student, start + BLOCK, student_stride, full, BLOCK)
        if HAS_TEACHER:
            next_t = load_ahead(teacher, start + BLOCK, teacher_stride, full, BLOCK)
        m_s, m_t, d_s, d_t, n_s, n_t, forward, reverse, largest_ratio, step_s, step_t, moment = first_step(
            s=s, t=t, start=start, inside=ids, m_s=m_s, m_t=m_t, d_s=d_s, d_t=d_t, n_s=n_s, n_t=n_t, forward=forward,
            reverse=reverse, largest_ratio=largest_ratio, step_s=step_s, step_t=step_t, moment=moment, c=c,
            HAS_TEACHER=HAS_TEACHER, STUDENT_AT_1=STUDENT_AT_1, TEACHER_AT_1=TEACHER_AT_1, FORWARD=FORWARD,
            REVERSE=REVERSE, RATIO=RATIO, AGREEMENT=AGREEMENT, MOMENT=MOMENT, TAIL=False, WIDTH=WIDTH,
        )  # fmt: skip
    if full < n_ids:
        offsets = full + ids
        inside = offsets < n_ids
        s = load_ids(student, offsets, student_stride, inside)
        t = s
        if HAS_TEACHER:
            t = load_ids(teacher, offsets, teacher_stride, inside)
        m_s, m_t, d_s, d_t, n_s, n_t, forward, reverse, largest_ratio, step_s, step_t, moment = first_step(
            s=s, t=t, start=full, inside=inside, m_s=m_s, m_t=m_t, d_s=d_s, d_t=d_t, n_s=n_s, n_t=n_t, forward=forward,
            reverse=reverse, largest_ratio=largest_ratio, step_s=step_s, step_t=step_t, moment=moment, c=c,
            HAS_TEACHER=HAS_TEACHER, STUDENT_AT_1=STUDENT_AT_1, TEACHER_AT_1=TEACHER_AT_1, FORWARD=FORWARD,
            REVERSE=REVERSE, RATIO=RATIO, AGREEMENT=AGREEMENT, MOMENT=MOMENT, TAIL=True, WIDTH=WIDTH,
        )  # fmt: skip

    row_m_s = tl.max(m_s, 0)
    row_m_t = tl.max(m_t, 0)
    move_s = m_s - row_m_s
    move_t = m_t - row_m_t
    factor_s = tl.exp2(move_s * c)
    factor_t = tl.exp2(move_t * c)
    row_n_s = 0.0
    row_n_t = 0.0
    row_forward = 0.0
    row_reverse = 0.0
    row_largest = LOWEST
    row_moment = 0.0
    ruled_out = 0.0
    first_s = NO_ID
    first_t = NO_ID
    if MOMENT:
        if STUDENT_AT_1:
            row_moment = tl.sum(moved_moment(moment, n_s, tl.exp2(move_s * LOG2_E), move_s), 0)
        else:
            row_moment = tl.sum(moved_moment(moment, d_s, factor_s, move_s), 0)
    if STUDENT_AT_1:
        row_n_s = tl.sum(n_s * tl.exp2(move_s * LOG2_E), 0)
    if TEACHER_AT_1:
        row_n_t = tl.sum(n_t * tl.exp2(move_t * LOG2_E), 0)
    if FORWARD:
        row_forward = tl.sum(moved_forward(forward, d_t, factor_t, move_s, move_t), 0)
    if REVERSE:
        row_reverse = tl.sum(moved_reverse(reverse, d_s, factor_s, move_s, move_t), 0)
        if RATIO:
            seen = (m_s > LOWEST) & (m_t > LOWEST)
            row_largest = tl.max(tl.where(seen, largest_ratio - (move_t - move_s), largest_ratio), 0)
        if row_reverse - row_reverse != 0.0:  # not finite: masked ids are rare, and take a pass of their own
            row_reverse, ruled_out, row_largest = ruled_out_pass(
                student=student, teacher=teacher, n_ids=n_ids, student_stride=student_stride,
                teacher_stride=teacher_stride, c=c, m_s=row_m_s, m_t=row_m_t, BLOCK=BLOCK, WIDTH=WIDTH,
            )  # fmt: skip
    if AGREEMENT:
        first_s = first_id(student, row_m_s, m_s, step_s, n_ids, student_stride, BLOCK)
        if HAS_TEACHER:
            first_t = first_id(teacher, row_m_t, m_t, step_t, n_ids, teacher_stride, BLOCK)
    return (
        row_m_s, row_m_t, tl.sum(d_s * factor_s, 0), tl.sum(d_t * factor_t, 0), row_n_s, row_n_t,
        row_forward, row_reverse, ruled_out, row_largest, first_s, first_t, row_moment,
    )  # fmt: skip


@triton.jit
def ruled_out_pass(
    student, teacher, n_ids, student_stride, teacher_stride, c, m_s, m_t, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """Return ``reverse``, ``ruled_out`` and ``largest_ratio`` of ``first_pass`` for a row with masked ids."""
    reverse = tl.zeros([BLOCK // GROUP], tl.float32)
    ruled_out = tl.zeros([BLOCK // GROUP], tl.float32)
    largest_ratio = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    for start in range(0, n_ids, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < n_ids
        us = groups(load_ids(student, offsets, student_stride, inside), WIDTH) - m_s
        t = groups(load_ids(teacher, offsets, teacher_stride, inside), WIDTH)
        e_s = tl.exp2(us * c)
        excluded = t <= LOWEST  # not where it is NaN, which has to be seen
        ratio = us - (t - m_t)
        reverse += group_sum(tl.where(excluded, 0.0, weighted(e_s, ratio)))
        ruled_out += group_sum(tl.where(excluded, e_s, 0.0))
        largest_ratio = tl.maximum(largest_ratio, group_max(tl.where(excluded, LOWEST, ratio)))
    return tl.sum(reverse, 0), tl.sum(ruled_out, 0), tl.max(largest_ratio, 0)


@triton.jit
def first_id(row, largest, of_groups, steps, n_ids, stride, BLOCK: tl.constexpr):
    """Find the first id at `largest`, in the first block in which a group's maximum ``[G]`` has come to it."""
    step = tl.min(tl.where(of_groups == largest, steps, NO_ID), 0)
    # a step is the first id of a block, which the compiler sees here, and loads 128 bits at a time
    offsets = tl.minimum(step, n_ids) // BLOCK * BLOCK + tl.arange(0, BLOCK)
    logits = load_ids(row, offsets, stride, offsets < n_ids)
    return tl.min(tl.where(logits == largest, offsets, NO_ID), 0)


@triton.jit
def kl_from_statistics(c, d_s, d_t, forward, reverse, ruled_out, largest_ratio):
    """Compute what one read already tells.

    Returns:
        KL(p‖q) and KL(q‖p) (where their statistics were asked for); the mean Σ q·x of the log-ratios and the limit that
        x is held to, for the gradient of the reverse KL. All in nats.
    """
    factor = c * LN2
    gap = gap_of(d_s, d_t)
    forward_kl = tl.div_rn(forward, d_t) * factor - gap
    limit = tl.maximum(largest_ratio * factor + gap, 0.0) + BEYOND_FINITE
    # in the form of x, so that it is x where one id has all of q
    mean = tl.div_rn(reverse, d_s) * factor + gap
    mean += weighted(tl.div_rn(ruled_out, d_s), limit - gap)
    reverse_kl = infinite_where(ruled_out > 0.0, mean)
    return forward_kl, reverse_kl, mean, tl.where(ruled_out > 0.0, limit, HUGE)
