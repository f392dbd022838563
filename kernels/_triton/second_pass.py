"""The second pass over a row of logits, which sums over probabilities, writes the gradient, or both.

Where the gradient needs a sum of this pass, another one of its kind writes it.

Legend: as in ``first_pass.py``; G groups of ids, see ``blocks.py``; a suffix ``_1``, and n for d: at T = 1.
"""

import triton
import triton.language as tl

from .blocks import GROUP, group_sum, groups, load_ahead, load_ids, store_block, subtract_at_label
from .math import (
    HUGE,
    LN2,
    LOG2_E,
    divergence_gradient,
    divergence_terms,
    forward_kl_terms,
    gap_of,
    nan_unless_number,
    value_and_centre,
)


@triton.jit
def second_step(
    s, t, start, ids, inside, out, out_stride, c, beta, one_minus_beta, label, m_s, m_t, log2_d_s, log2_d_t, gap,
    log2_n_s, log2_n_t, gap_1, centre, limit, kd_weight, ce_weight,
    value, centres, mass, kl, entropy_s, entropy_t, acceptance,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr,
    STUDENT_AT_1: tl.constexpr, TEACHER_AT_1: tl.constexpr, KL: tl.constexpr, ENTROPIES: tl.constexpr,
    ACCEPTANCE: tl.constexpr, TERMS: tl.constexpr, GRADIENT: tl.constexpr, BETA_ABOVE_HALF: tl.constexpr,
    APPROXIMATE: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Take one block into the sums of its groups ``[G]``, and write its gradient.

    Args:
        inside: ids of the row, where it ends in the block (TAIL); else unread.
    """
    us = s.to(tl.float32) - m_s
    lq = us * c - log2_d_s
    q = tl.exp2(lq)
    lq_1 = lq
    q_1 = q
    if STUDENT_AT_1:
        lq_1 = us * LOG2_E - log2_n_s
        q_1 = tl.exp2(lq_1)
    if HAS_TEACHER:
        ut = t.to(tl.float32) - m_t
        lp = ut * c - log2_d_t
        p = tl.exp2(lp)
        # Exactly 0 where the models are equal: of a difference of two products the compiler would round only one (a
        # fused multiply-add), and leave the rounding error of the other.
        x = (us - ut) * (c * LN2) + gap
        if TERMS and HAS_KD:
            first, second = divergence_terms(
                DIVERGENCE, beta, one_minus_beta, p, q, x, limit, BETA_ABOVE_HALF, APPROXIMATE
            )
            of_value, of_centre = value_and_centre(
                DIVERGENCE, beta, one_minus_beta, group_sum(groups(first, WIDTH)), group_sum(groups(second, WIDTH))
            )
            value += of_value
            centres += of_centre
            mass += group_sum(groups(q, WIDTH))
    if TERMS and ENTROPIES:
        entropy_s -= group_sum(groups(q_1 * tl.maximum(lq_1, -HUGE), WIDTH))
    if (HAS_TEACHER and TERMS) and (KL or (ENTROPIES or ACCEPTANCE)):
        lp_1 = lp
        p_1 = p
        x_1 = x
        if TEACHER_AT_1:
            lp_1 = ut * LOG2_E - log2_n_t
            p_1 = tl.exp2(lp_1)
            x_1 = (us - ut) + gap_1
        if KL:
            kl += group_sum(groups(forward_kl_terms(p_1, q_1, x_1), WIDTH))
        if ENTROPIES:
            entropy_t -= group_sum(groups(p_1 * tl.maximum(lp_1, -HUGE), WIDTH))
        if ACCEPTANCE:
            acceptance += group_sum(groups(tl.minimum(p_1, q_1), WIDTH))
    if GRADIENT:
        grad = q * 0.0
        if HAS_KD:
            grad = divergence_gradient(
                DIVERGENCE, kd_weight, beta, one_minus_beta, p, q, x, centre, limit, BETA_ABOVE_HALF, APPROXIMATE
            )
        if HAS_CE:
            grad += ce_weight * q_1
            grad = subtract_at_label(grad, start, ids, label, ce_weight)
        store_block(out, start, ids, inside, out_stride, grad, TAIL)
    return value, centres, mass, kl, entropy_s, entropy_t, acceptance


@triton.jit
def second_pass(
    student, teacher, out, n_ids, student_stride, teacher_stride, out_stride, c, beta, one_minus_beta, label,
    m_s, m_t, d_s, d_t, n_s, n_t, centre, limit, kd_weight, ce_weight,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr,
    STUDENT_AT_1: tl.constexpr, TEACHER_AT_1: tl.constexpr, KL: tl.constexpr, ENTROPIES: tl.constexpr,
    ACCEPTANCE: tl.constexpr, TERMS: tl.constexpr, GRADIENT: tl.constexpr, BETA_ABOVE_HALF: tl.constexpr,
    APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Read both rows again, with the whole row's statistics known: sum over probabilities, write the gradient, or both.

    Args:
        out: receives ``kd_weight·dD/dz + ce_weight·(q_1 - [id = label])`` (if GRADIENT); may be `student`.
        label: id in this shard of the row; any other number where the label lies elsewhere.

    Returns:
        if TERMS: the value of D, its centre (see ``value_and_centre``), Σ q; KL(p‖q) at T = 1 (if KL), the entropies of
        q and p (if ENTROPIES), Σ min(p, q) (if ACCEPTANCE).
    """
    value = tl.zeros([BLOCK // GROUP], tl.float32)
    centres = tl.zeros([BLOCK // GROUP], tl.float32)
    mass = tl.zeros([BLOCK // GROUP], tl.float32)
    kl = tl.zeros([BLOCK // GROUP], tl.float32)
    entropy_s = tl.zeros([BLOCK // GROUP], tl.float32)
    entropy_t = tl.zeros([BLOCK // GROUP], tl.float32)
    acceptance = tl.zeros([BLOCK // GROUP], tl.float32)
    log2_d_s = tl.log2(d_s)
    log2_d_t = tl.log2(d_t)
    gap = gap_of(d_s, d_t)
    log2_n_s = tl.log2(n_s)
    log2_n_t = tl.log2(n_t)
    gap_1 = gap_of(n_s, n_t)
    # KL(p‖q) at T = 1 is the divergence itself. (At another T it is not asked for, or the teacher is needed at 1.)
    SAME: tl.constexpr = (HAS_KD and DIVERGENCE == "forward_kl") and not TEACHER_AT_1
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
        value, centres, mass, kl, entropy_s, entropy_t, acceptance = second_step(
            s=s, t=t, start=start, ids=ids, inside=ids, out=out, out_stride=out_stride, c=c, beta=beta,
            one_minus_beta=one_minus_beta, label=label, m_s=m_s, m_t=m_t, log2_d_s=log2_d_s, log2_d_t=log2_d_t,
            gap=gap, log2_n_s=log2_n_s, log2_n_t=log2_n_t, gap_1=gap_1, centre=centre, limit=limit,
            kd_weight=kd_weight, ce_weight=ce_weight, value=value, centres=centres, mass=mass, kl=kl,
            entropy_s=entropy_s, entropy_t=entropy_t, acceptance=acceptance, DIVERGENCE=DIVERGENCE,
            HAS_TEACHER=HAS_TEACHER, HAS_KD=HAS_KD, HAS_CE=HAS_CE, STUDENT_AT_1=STUDENT_AT_1,
            TEACHER_AT_1=TEACHER_AT_1, KL=KL and not SAME, ENTROPIES=ENTROPIES, ACCEPTANCE=ACCEPTANCE, TERMS=TERMS,
            GRADIENT=GRADIENT, BETA_ABOVE_HALF=BETA_ABOVE_HALF, APPROXIMATE=APPROXIMATE, TAIL=False, WIDTH=WIDTH,
        )  # fmt: skip
    if full < n_ids:
        offsets = full + ids
        inside = offsets < n_ids
        s = load_ids(student, offsets, student_stride, inside)
        t = s
        if HAS_TEACHER:
            t = load_ids(teacher, offsets, teacher_stride, inside)
        value, centres, mass, kl, entropy_s, entropy_t, acceptance = second_step(
            s=s, t=t, start=full, ids=ids, inside=inside, out=out, out_stride=out_stride, c=c, beta=beta,
            one_minus_beta=one_minus_beta, label=label, m_s=m_s, m_t=m_t, log2_d_s=log2_d_s, log2_d_t=log2_d_t,
            gap=gap, log2_n_s=log2_n_s, log2_n_t=log2_n_t, gap_1=gap_1, centre=centre, limit=limit,
            kd_weight=kd_weight, ce_weight=ce_weight, value=value, centres=centres, mass=mass, kl=kl,
            entropy_s=entropy_s, entropy_t=entropy_t, acceptance=acceptance, DIVERGENCE=DIVERGENCE,
            HAS_TEACHER=HAS_TEACHER, HAS_KD=HAS_KD, HAS_CE=HAS_CE, STUDENT_AT_1=STUDENT_AT_1,
            TEACHER_AT_1=TEACHER_AT_1, KL=KL and not SAME, ENTROPIES=ENTROPIES, ACCEPTANCE=ACCEPTANCE, TERMS=TERMS,
            GRADIENT=GRADIENT, BETA_ABOVE_HALF=BETA_ABOVE_HALF, APPROXIMATE=APPROXIMATE, TAIL=True, WIDTH=WIDTH,
        )  # fmt: skip
    # minima and maxima hide NaN
    row_value = nan_unless_number(d_s + d_t, tl.sum(value, 0))
    row_kl = nan_unless_number(d_s + d_t, tl.sum(kl, 0))
    if SAME:
        row_kl = row_value
    row_acceptance = nan_unless_number(d_s + d_t, tl.sum(acceptance, 0))
    return (
        row_value, tl.sum(centres, 0), tl.sum(mass, 0), row_kl, tl.sum(entropy_s, 0) * LN2, tl.sum(entropy_t, 0) * LN2,
        row_acceptance,
    )  # fmt: skip


@triton.jit
def centre_of(DIVERGENCE: tl.constexpr, centres, mass):
    """Return the centre for ``divergence_gradient``; Σ q as the divisor makes both of its terms equal where p = q."""
    if DIVERGENCE == "skew_forward_kl":
        return tl.where(centres == mass, 1.0, tl.div_rn(centres, mass))
    return centres
