"""The passes over one row of logits: the first sums exponentials, the second probabilities, and writes the gradient.

They are device functions: one kernel calls both for a whole row, other kernels one of them for a shard of a row.

Legend: V ids of the row (or of its shard); T temperature, ``c = log2(e)/T``; ``m_s``, ``m_t`` largest raw logits;
``us = (s - m_s)·c``; for other names see ``math.py``.
"""

import math

import triton
import triton.language as tl

from .._objective import BEYOND_FINITE as _BEYOND_FINITE
from .math import (
    LN2,
    LOG2_E,
    difference,
    divergence_gradient,
    divergence_terms,
    forward_kl_terms,
    weighted,
)

# By how much, in powers of 2, the log-ratio that stands for +inf in a gradient exceeds the row's largest finite one.
BEYOND_FINITE = tl.constexpr(_BEYOND_FINITE * math.log2(math.e))
# Logits from here down are taken for -inf. A running maximum starts here, finite, so that differences are.
LOWEST = tl.constexpr(-1.0e30)
GROUP = tl.constexpr(8)  # 128 bits of bf16
NO_ID = tl.constexpr(2147483647)


@triton.jit
def _groups(x):
    """Cut a block into groups of neighbours ``[BLOCK / GROUP, GROUP]``."""
    return tl.reshape(x, [x.shape[0] // GROUP, GROUP])


@triton.jit
def fold(x):
    """Sum groups of neighbours ``[BLOCK / GROUP]``, so that a running sum takes one register of a thread, not eight.

    A thread holds a whole group where rows are loaded 128 bits at a time: with V a multiple of 16. Else its ids lie
    across threads, and these exchange them.
    """
    return tl.sum(_groups(x), 1)


@triton.jit
def fold_max(x):
    """Find the maxima of groups of neighbours ``[BLOCK / GROUP]``."""
    return tl.max(_groups(x), 1)


@triton.jit
def fold_min(x):
    """Find the minima of groups of neighbours ``[BLOCK / GROUP]``."""
    return tl.min(_groups(x), 1)


@triton.jit
def load_block(row, offsets, n_ids, stride):
    """Load logits in fp32, -inf beyond the row. A stride of 1 is a constant here and leaves offsets 32 bits wide."""
    if stride == 1:
        logits = tl.load(row + offsets, mask=offsets < n_ids, other=-float("inf"))
    else:
        logits = tl.load(row + offsets.to(tl.int64) * stride, mask=offsets < n_ids, other=-float("inf"))
    return logits.to(tl.float32)


@triton.jit
def exponent(logits, c, largest):
    """Compute (logits - largest)·c. In this order it is exactly 0 at the largest, which one multiply-add would miss."""
    return (logits - largest) * c


@triton.jit
def log_ratio(s, largest_s, t, largest_t, c):
    """Compute us - ut, exactly 0 where the models are equal.

    Of a difference of two products the compiler would round only one (a fused multiply-add), and leave the rounding
    error of the other.
    """
    return ((s - largest_s) - (t - largest_t)) * c


@triton.jit
def move_of(old, new, c):
    """Return by how much u falls when the maximum it is relative to rises; 0 where nothing finite was seen before."""
    return tl.where(old > LOWEST, (old - new) * c, 0.0)


@triton.jit
def moved_forward(forward, d_t, move_s, move_t):
    """Rescale ``forward`` of ``first_pass`` to new maxima; README.md derives it and the next."""
    return weighted(tl.exp2(move_t), forward + d_t * (move_t - move_s))


@triton.jit
def moved_reverse(reverse, d_s, ruled_out, move_s, move_t):
    """Rescale ``reverse`` of ``first_pass`` to new maxima."""
    return tl.exp2(move_s) * (reverse - (d_s - ruled_out) * (move_t - move_s))


@triton.jit
def first_pass(
    student, teacher, n_ids, student_stride, teacher_stride, c,
    HAS_TEACHER: tl.constexpr, AT_TEMPERATURE_1: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Read both rows once, and compute the statistics that need no probability.

    Returns:
        m_s, m_t;
        d_s = Σ 2^us, d_t = Σ 2^ut;
        n_s, n_t: the same at T = 1 (if AT_TEMPERATURE_1);
        forward = Σ 2^ut·(ut - us) (if FORWARD);
        and if REVERSE: reverse = Σ 2^us·(us - ut) without the ids that the teacher rules out, ruled_out = Σ 2^us
        over those, largest_ratio = the largest finite us - ut.
    """
    m_s = LOWEST
    m_t = LOWEST
    d_s = tl.zeros([BLOCK // GROUP], tl.float32)
    d_t = tl.zeros([BLOCK // GROUP], tl.float32)
    n_s = tl.zeros([BLOCK // GROUP], tl.float32)
    n_t = tl.zeros([BLOCK // GROUP], tl.float32)
    forward = tl.zeros([BLOCK // GROUP], tl.float32)
    reverse = tl.zeros([BLOCK // GROUP], tl.float32)
    ruled_out = tl.zeros([BLOCK // GROUP], tl.float32)
    largest_ratio = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    for start in range(0, n_ids, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        s = load_block(student, offsets, n_ids, student_stride)
        t = s
        if HAS_TEACHER:  # before the maximum of s, so that both loads are in flight at a time
            t = load_block(teacher, offsets, n_ids, teacher_stride)
        new_s = tl.maximum(m_s, tl.max(s, 0))
        us = exponent(s, c, new_s)
        e_s = tl.exp2(us)
        move_s = move_of(m_s, new_s, c)
        if AT_TEMPERATURE_1:
            n_s = n_s * tl.exp2((m_s - new_s) * LOG2_E) + fold(tl.exp2(exponent(s, LOG2_E, new_s)))
        if HAS_TEACHER:
            new_t = tl.maximum(m_t, tl.max(t, 0))
            log2_ratio = log_ratio(s, new_s, t, new_t, c)
            ut = exponent(t, c, new_t)
            e_t = tl.exp2(ut)
            move_t = move_of(m_t, new_t, c)
            if FORWARD:
                forward = moved_forward(forward, d_t, move_s, move_t) + fold(weighted(e_t, -log2_ratio))
            if REVERSE:
                allowed = t > LOWEST
                reverse = moved_reverse(reverse, d_s, ruled_out, move_s, move_t)
                reverse += fold(tl.where(allowed, weighted(e_s, log2_ratio), 0.0))
                ruled_out = tl.exp2(move_s) * ruled_out + fold(tl.where(allowed, 0.0, e_s))
                largest = fold_max(tl.where(allowed, log2_ratio, LOWEST))
                largest_ratio = tl.maximum(largest_ratio - (move_t - move_s), largest)
            if AT_TEMPERATURE_1:
                n_t = n_t * tl.exp2((m_t - new_t) * LOG2_E) + fold(tl.exp2(exponent(t, LOG2_E, new_t)))
            d_t = d_t * tl.exp2(move_t) + fold(e_t)
            m_t = new_t
        d_s = d_s * tl.exp2(move_s) + fold(e_s)
        m_s = new_s
    return (
        m_s, m_t, tl.sum(d_s, 0), tl.sum(d_t, 0), tl.sum(n_s, 0), tl.sum(n_t, 0),
        tl.sum(forward, 0), tl.sum(reverse, 0), tl.sum(ruled_out, 0), tl.max(largest_ratio, 0),
    )  # fmt: skip


@triton.jit
def kl_from_statistics(d_s, d_t, forward, reverse, ruled_out, largest_ratio):
    """Compute what one read already tells.

    Returns:
        KL(p‖q) and KL(q‖p) in nats (where their statistics were asked for); the mean Σ q·r of the log-ratios and
        the limit that r is held to, both in powers of 2, for the gradient of the reverse KL.
    """
    gap = tl.log2(d_t) - tl.log2(d_s)
    forward_kl = (forward / d_t - gap) * LN2
    limit = tl.maximum(largest_ratio + gap, 0.0) + BEYOND_FINITE
    mean = (reverse + weighted(ruled_out, limit - gap)) / d_s + gap
    reverse_kl = tl.where(ruled_out > 0.0, float("inf"), mean * LN2)
    return forward_kl, reverse_kl, mean, limit


@triton.jit
def not_negative(x):
    """Return max(x, 0), and NaN for NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def second_pass(
    student, teacher, out, n_ids, student_stride, teacher_stride, out_stride, c, beta, one_minus_beta, label,
    m_s, m_t, d_s, d_t, n_s, n_t, centre, limit, kd_weight, ce_weight,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr,
    AT_TEMPERATURE_1: tl.constexpr, METRICS: tl.constexpr, TERMS: tl.constexpr, GRADIENT: tl.constexpr,
    BACKWARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read both rows again, with the whole row's statistics known: sum over probabilities, write the gradient, or both.

    Args:
        out: receives ``kd_weight·dD/dz + ce_weight·(q - [id = label])`` (if GRADIENT); may be `student`.
        label: id in this shard of the row; any other number where the label lies elsewhere.
        BACKWARDS: walk from the last id to the first, because the pass before has left the last ones in the cache.

    Returns:
        if TERMS: the value of D, its centre (see ``divergence_terms``), Σ q; with METRICS also KL(p‖q) at T = 1, the
        entropies of q and p, Σ min(p, q), and the first ids at m_s and m_t.
    """
    value = tl.zeros([BLOCK // GROUP], tl.float32)
    centres = tl.zeros([BLOCK // GROUP], tl.float32)
    mass = tl.zeros([BLOCK // GROUP], tl.float32)
    kl = tl.zeros([BLOCK // GROUP], tl.float32)
    entropy_s = tl.zeros([BLOCK // GROUP], tl.float32)
    entropy_t = tl.zeros([BLOCK // GROUP], tl.float32)
    acceptance = tl.zeros([BLOCK // GROUP], tl.float32)
    first_s = tl.full([BLOCK // GROUP], NO_ID, tl.int32)
    first_t = tl.full([BLOCK // GROUP], NO_ID, tl.int32)
    blocks = tl.cdiv(n_ids, BLOCK)
    for i in range(0, blocks):
        if BACKWARDS:
            offsets = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        else:
            offsets = i * BLOCK + tl.arange(0, BLOCK)
        s = load_block(student, offsets, n_ids, student_stride)
        us = exponent(s, c, m_s)
        lq = us - tl.log2(d_s)
        q = tl.exp2(lq)
        lq_1 = lq
        q_1 = q
        if AT_TEMPERATURE_1:
            lq_1 = exponent(s, LOG2_E, m_s) - tl.log2(n_s)
            q_1 = tl.exp2(lq_1)
        if HAS_TEACHER:
            t = load_block(teacher, offsets, n_ids, teacher_stride)
            ut = exponent(t, c, m_t)
            lp = ut - tl.log2(d_t)
            p = tl.exp2(lp)
            r = log_ratio(s, m_s, t, m_t, c) + (tl.log2(d_t) - tl.log2(d_s))
            if TERMS and HAS_KD:
                terms, parts = divergence_terms(DIVERGENCE, beta, one_minus_beta, p, q, lp, lq, r)
                value += fold(terms)
                centres += fold(parts)
                mass += fold(q)
        if TERMS and METRICS:
            entropy_s -= fold(weighted(q_1, lq_1))
            first_s = tl.minimum(first_s, fold_min(tl.where(s == m_s, offsets, NO_ID)))
            if HAS_TEACHER:
                lp_1 = lp
                p_1 = p
                r_1 = r
                if AT_TEMPERATURE_1:
                    lp_1 = exponent(t, LOG2_E, m_t) - tl.log2(n_t)
                    p_1 = tl.exp2(lp_1)
                    r_1 = log_ratio(s, m_s, t, m_t, LOG2_E) + (tl.log2(n_t) - tl.log2(n_s))
                kl += fold(forward_kl_terms(p_1, difference(p_1, q_1, r_1), r_1))
                entropy_t -= fold(weighted(p_1, lp_1))
                acceptance += fold(0.5 * (p_1 + q_1 - tl.abs(p_1 - q_1)))  # tl.minimum would hide a NaN
                first_t = tl.minimum(first_t, fold_min(tl.where(t == m_t, offsets, NO_ID)))
        if GRADIENT:
            grad = tl.zeros([BLOCK], tl.float32)
            if HAS_KD:
                grad = kd_weight * divergence_gradient(DIVERGENCE, beta, one_minus_beta, p, q, lp, lq, r, centre, limit)
            if HAS_CE:
                grad += ce_weight * (q_1 - tl.where(offsets == label, 1.0, 0.0))
            if out_stride == 1:
                places = out + offsets
            else:
                places = out + offsets.to(tl.int64) * out_stride
            tl.store(places, grad.to(out.dtype.element_ty), mask=offsets < n_ids)
    return (
        tl.sum(value, 0), tl.sum(centres, 0), tl.sum(mass, 0), tl.sum(kl, 0), tl.sum(entropy_s, 0) * LN2,
        tl.sum(entropy_t, 0) * LN2, tl.sum(acceptance, 0), tl.min(first_s, 0), tl.min(first_t, 0),
    )  # fmt: skip


@triton.jit
def fill_zeros(out, n_ids, stride, BLOCK: tl.constexpr):
    """Write the gradient of a token that is ignored."""
    zeros = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
    for start in range(0, n_ids, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(out + offsets.to(tl.int64) * stride, zeros, mask=offsets < n_ids)


@triton.jit
def centre_of(DIVERGENCE: tl.constexpr, centres, mass):
    """Return the centre for ``divergence_gradient``; Σ q as the divisor makes both of its terms equal where p = q."""
    if DIVERGENCE == "skew_forward_kl":
        return tl.where(centres == mass, 1.0, centres / mass)
    return centres


@triton.jit
def cross_entropy(logit, largest, normaliser):
    """Compute -ln softmax of the label's logit at T = 1."""
    return (tl.log2(normaliser) - exponent(logit, LOG2_E, largest)) * LN2
