"""The kernels that give a row to one program, and the scaling of a stored gradient.

Legend: N rows, V ids. ``results`` is ``[N, RESULTS]`` in fp32: the loss, then the metrics in their order.
Rows are addressed as
``((row // inner)·outer_stride + (row % inner)·inner_stride)·WIDTH``, which covers ``[B, S, V]`` that no view flattens;
WIDTH neighbouring ids are loaded at a time.
No argument that grows with N is specialised on, but for strides between sequences (a multiple of 16 or not, 32 bits or
64): a new number of tokens compiles nothing where rows are contiguous, and at most twice where they are not.
"""

import triton
import triton.language as tl

from .blocks import fill_zeros
from .first_pass import first_pass, kl_from_statistics
from .math import cross_entropy, infinite_where, not_negative, weighted
from .second_pass import centre_of, second_pass

RESULTS = tl.constexpr(9)

_GROWING = ["student_inner", "teacher_inner", "out_inner"]


@triton.jit
def row_start(pointer, row, inner, outer_stride, inner_stride, WIDTH: tl.constexpr):
    """Return the address of a row; 64 bits wide, since N·V soon leaves 32."""
    row = row.to(tl.int64)
    return pointer + ((row // inner) * outer_stride + (row % inner) * inner_stride) * WIDTH


@triton.jit
def id_in(label, n_ids):
    """Return a label (64 bits) as one of the n_ids ids; -1 if it is none of them."""
    return tl.where((label >= 0) & (label < n_ids), label, -1).to(tl.int32)


@triton.jit
def load_logit(row, label, stride, other):
    """Load the label's logit; `other` where the label lies elsewhere (-1)."""
    return tl.load(row + label.to(tl.int64) * stride, mask=label >= 0, other=other).to(tl.float32)


@triton.jit
def kl_value(DIVERGENCE: tl.constexpr, beta, one_minus_beta, forward_kl, reverse_kl):
    """Return forward, reverse or symmetric KL from the first two; a weight of 0 keeps out one that is +inf."""
    value = forward_kl
    if DIVERGENCE == "reverse_kl":
        value = reverse_kl
    elif DIVERGENCE == "symmetric_kl":
        value = weighted(beta, forward_kl) + weighted(one_minus_beta, reverse_kl)
    return value


@triton.jit
def store_first_results(results, class_loss, teacher_class_loss, agreement):
    """Store what the first pass has found, in the order of ``_objective.METRICS``, so that later passes keep less."""
    tl.store(results + 1, class_loss)
    tl.store(results + 2, teacher_class_loss)
    tl.store(results + 5, agreement)


@triton.jit
def store_results(
    results, kd_ratio, kd_scale, ce_weight, class_loss, divergence, kl, entropy_s, entropy_t, acceptance,
):  # fmt: skip
    """Store the loss of a row, and the rest of its parts."""
    kd_loss = not_negative(divergence) * kd_scale
    tl.store(results, weighted(kd_ratio, kd_loss) + weighted(ce_weight, class_loss))
    tl.store(results + 3, kd_loss)
    tl.store(results + 4, kl)
    tl.store(results + 6, entropy_s)
    tl.store(results + 7, entropy_t)
    tl.store(results + 8, acceptance)


@triton.jit
def store_zeros(results):
    """Store the results of a token that is ignored."""
    for i in tl.static_range(RESULTS):
        tl.store(results + i, 0.0)


@triton.jit(do_not_specialize=_GROWING)
def rows_kernel(
    student, teacher, labels, out, results, row_scale,
    student_inner, student_outer_stride, student_inner_stride, student_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride, teacher_stride,
    out_inner, out_outer_stride, out_inner_stride, out_stride, scale_stride,
    n_ids, ignore_index, c, beta, one_minus_beta, kd_ratio, kd_scale, kd_slope, ce_weight,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr,
    HAS_LABELS: tl.constexpr, STUDENT_AT_1: tl.constexpr, TEACHER_AT_1: tl.constexpr, KL: tl.constexpr,
    ENTROPIES: tl.constexpr, AGREEMENT: tl.constexpr, ACCEPTANCE: tl.constexpr, GRADIENT: tl.constexpr,
    THREE_PASSES: tl.constexpr, BETA_ABOVE_HALF: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute everything about one row: loss, metrics and gradient.

    Args:
        row_scale: multiplies the row's gradient, as the mean and the caller's `scale` do; one number (stride 0) or one
            per row.
        kd_ratio, ce_weight: weights of the divergence and of the cross-entropy in the loss. kd_scale: factor of D,
            T² or 1. kd_slope: weight of dD/dz, z = s/T.
        HAS_KD: D is computed; HAS_CE: the cross-entropy has a gradient (its value comes with the labels). A weight of 0
            leaves either out of the loss.
        STUDENT_AT_1, TEACHER_AT_1: statistics at T = 1 are needed beside those at T.
        KL, ENTROPIES, AGREEMENT, ACCEPTANCE: the metrics that are computed.
        THREE_PASSES: the gradient needs a sum over normalised p and q first, from a second pass that writes nothing.
        BETA_ABOVE_HALF: see ``math.jsd_logarithms``. APPROXIMATE: see ``math.log2_of``.
    """
    row = tl.program_id(0)
    s = row_start(student, row, student_inner, student_outer_stride, student_inner_stride, WIDTH)
    t = row_start(teacher, row, teacher_inner, teacher_outer_stride, teacher_inner_stride, WIDTH)
    o = row_start(out, row, out_inner, out_outer_stride, out_inner_stride, WIDTH)
    results += row.to(tl.int64) * RESULTS
    label = -1
    label_s = 0.0
    label_t = 0.0
    if HAS_LABELS:
        label = tl.load(labels + row)
        if label == ignore_index:
            if GRADIENT:
                fill_zeros(o, n_ids, out_stride, BLOCK)
            store_zeros(results)
            return
        # NaN for a label outside of the vocabulary, which the host does not see. Read now, because the gradient may be
        # written over the logits: the reductions of the first pass are barriers in between.
        label = id_in(label, n_ids)
        label_s = load_logit(s, label, student_stride, float("nan"))
        if HAS_TEACHER:
            label_t = load_logit(t, label, teacher_stride, float("nan"))

    SECOND: tl.constexpr = (GRADIENT or THREE_PASSES) or ((KL or ENTROPIES) or ACCEPTANCE)  # 3.2 refuses A or B or C
    m_s, m_t, d_s, d_t, n_s, n_t, forward, reverse, ruled_out, largest_ratio, first_s, first_t, _ = first_pass(
        student=s, teacher=t, n_ids=n_ids, student_stride=student_stride, teacher_stride=teacher_stride, c=c,
        HAS_TEACHER=HAS_TEACHER, STUDENT_AT_1=STUDENT_AT_1, TEACHER_AT_1=TEACHER_AT_1,
        FORWARD=(HAS_KD and not SECOND) and (DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl"),
        REVERSE=HAS_KD and (DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl"), RATIO=False,
        AGREEMENT=AGREEMENT, MOMENT=False, BLOCK=BLOCK, WIDTH=WIDTH,
    )  # fmt: skip
    if not STUDENT_AT_1:
        n_s = d_s
    if not TEACHER_AT_1:
        n_t = d_t
    class_loss = 0.0
    teacher_class_loss = 0.0
    if HAS_LABELS:  # of use at T = 1 or with the statistics at 1; else its weight is 0 and no metric reads it
        class_loss = cross_entropy(label_s, m_s, n_s)
        if HAS_TEACHER:
            teacher_class_loss = cross_entropy(label_t, m_t, n_t)
    divergence = 0.0
    centre = 0.0
    limit = 0.0
    kl = 0.0
    agreement = 0.0
    entropy_s = 0.0
    entropy_t = 0.0
    acceptance = 0.0
    if AGREEMENT:
        agreement = tl.where(first_s == first_t, 1.0, 0.0)
    store_first_results(results, class_loss, teacher_class_loss, agreement)
    if HAS_KD and not THREE_PASSES:
        forward_kl, reverse_kl, centre, limit = kl_from_statistics(
            c, d_s, d_t, forward, reverse, ruled_out, largest_ratio
        )
        divergence = kl_value(DIVERGENCE, beta, one_minus_beta, forward_kl, reverse_kl)

    scale = 1.0
    if GRADIENT:
        scale = tl.load(row_scale + row.to(tl.int64) * scale_stride).to(tl.float32)
    if SECOND:
        value, centres, mass, kl, entropy_s, entropy_t, acceptance = second_pass(
            student=s, teacher=t, out=o, n_ids=n_ids, student_stride=student_stride, teacher_stride=teacher_stride,
            out_stride=out_stride, c=c, beta=beta, one_minus_beta=one_minus_beta, label=label,
            m_s=m_s, m_t=m_t, d_s=d_s, d_t=d_t, n_s=n_s, n_t=n_t, centre=centre, limit=limit,
            kd_weight=kd_slope * scale, ce_weight=ce_weight * scale,
            DIVERGENCE=DIVERGENCE, HAS_TEACHER=HAS_TEACHER, HAS_KD=HAS_KD, HAS_CE=HAS_CE, STUDENT_AT_1=STUDENT_AT_1,
            TEACHER_AT_1=TEACHER_AT_1, KL=KL, ENTROPIES=ENTROPIES, ACCEPTANCE=ACCEPTANCE, TERMS=True,
            GRADIENT=GRADIENT and not THREE_PASSES, BETA_ABOVE_HALF=BETA_ABOVE_HALF, APPROXIMATE=APPROXIMATE,
            BLOCK=BLOCK, WIDTH=WIDTH,
        )  # fmt: skip
        divergence = infinite_where(ruled_out > 0.0, value)
    if GRADIENT and THREE_PASSES:
        second_pass(
            student=s, teacher=t, out=o, n_ids=n_ids, student_stride=student_stride, teacher_stride=teacher_stride,
            out_stride=out_stride, c=c, beta=beta, one_minus_beta=one_minus_beta, label=label,
            m_s=m_s, m_t=m_t, d_s=d_s, d_t=d_t, n_s=n_s, n_t=n_t, centre=centre_of(DIVERGENCE, centres, mass),
            limit=limit, kd_weight=kd_slope * scale, ce_weight=ce_weight * scale,
            DIVERGENCE=DIVERGENCE, HAS_TEACHER=HAS_TEACHER, HAS_KD=HAS_KD, HAS_CE=HAS_CE, STUDENT_AT_1=STUDENT_AT_1,
            TEACHER_AT_1=TEACHER_AT_1, KL=False, ENTROPIES=False, ACCEPTANCE=False, TERMS=False, GRADIENT=True,
            BETA_ABOVE_HALF=BETA_ABOVE_HALF, APPROXIMATE=APPROXIMATE, BLOCK=BLOCK, WIDTH=WIDTH,
        )  # fmt: skip
    store_results(
        results=results, kd_ratio=kd_ratio, kd_scale=kd_scale, ce_weight=ce_weight, class_loss=class_loss,
        divergence=divergence, kl=kl, entropy_s=entropy_s, entropy_t=entropy_t, acceptance=acceptance,
    )  # fmt: skip


@triton.jit
def scale_kernel(grad, out, scale, n_ids, ROWS: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Write grad·scale to `out`, a program a row; scale is one number or (ROWS) one per row.

    A single scale of 1 is seen here, on the device: no host waits for its value, and in place (`out` is `grad`) the
    program ends before it reads the gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row) if ROWS else tl.load(scale)
    if (ROWS or not IN_PLACE) or factor != 1.0:
        grad += row * n_ids
        out += row * n_ids
        for start in range(0, n_ids, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            value = tl.load(grad + offsets, mask=offsets < n_ids).to(tl.float32) * factor
            tl.store(out + offsets, value.to(out.dtype.element_ty), mask=offsets < n_ids)
