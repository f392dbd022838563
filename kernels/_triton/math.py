"""Arithmetic on a block of ids, shared by all Triton kernels of this folder.

Legend: s, t student and teacher logits; T temperature; q, p their softmaxes; ``x = ln(q/p)``, which comes from the
logits and not from p and q; m the mixture of a divergence.
Exponentials are powers of 2, because ``exp2`` is one instruction on a GPU. ``tl.log2`` is not: a loop takes NVIDIA's
approximation of it, and a polynomial where the result is small.
Padding and ids masked in both models are -inf and contribute nothing: x is NaN there, ``minimum`` and ``maximum``
return the other operand, and what is finite is multiplied by p = q = 0. The formulas are those of
``_torch/divergences.py``; README.md derives them.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
NEAR = tl.constexpr(0.35)  # |x| below which differences of p and q come from a series of x
CLOSE = tl.constexpr(0.25)  # |m/own - 1| below which its logarithm comes from a polynomial
HUGE = tl.constexpr(1.0e30)  # stands for an infinite x where 0·x has to be 0
FAR = tl.constexpr(87.0)  # e^87 and e^-87 are normal numbers in fp32; a share beyond them is nothing beside the other


@triton.jit
def weighted(weight, value):
    """Return weight·value with 0·(±inf) = 0."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def log2_of(x, APPROXIMATE: tl.constexpr):
    """Compute log2(x); if APPROXIMATE by NVIDIA's instruction, wrong by 2^-22, between 0.5 and 2 of 1."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def reciprocal(x, APPROXIMATE: tl.constexpr):
    """Compute 1/x; if APPROXIMATE by one instruction, within one rounding."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.div_rn(1.0, x)


@triton.jit
def second_order(x):
    """Compute e^x - 1 - x for abs(x) < NEAR by its series; the first term left out is 1e-7 of the first."""
    series = 0.001388888888888889 + x * 0.0001984126984126984
    series = 0.008333333333333333 + x * series
    series = 0.041666666666666664 + x * series
    series = 0.16666666666666666 + x * series
    return x * x * (0.5 + x * series)


@triton.jit
def is_near(x):
    """Return where abs(x) < NEAR; not where x is NaN."""
    return tl.abs(x) < NEAR


@triton.jit
def difference(p, q, x):
    """Compute q - p, where both are close from their log-ratio."""
    return tl.where(is_near(x), p * (x + second_order(x)), q - p)


@triton.jit
def forward_kl_terms(p, q, x):
    """Compute the terms of Σ p·ln(p/q), plus q - p: these sum to 0, and make each term p·(e^x - 1 - x) >= 0.

    Where p = q = 0 and x is -inf the product is NaN, and the maximum 0: so NaN in a logit does not show here.
    """
    far = (q - p) - p * tl.minimum(x, HUGE)
    return tl.where(is_near(x), p * second_order(x), tl.maximum(far, 0.0))


@triton.jit
def reverse_kl_terms(p, q, x):
    """Compute the terms of Σ q·ln(q/p), minus q - p: p·(x² + (x - 1)·(e^x - 1 - x)). ``x`` is finite."""
    near = p * (x * x + (x - 1.0) * second_order(x))
    return tl.where(is_near(x), near, q * x - (q - p))


@triton.jit
def symmetric_kl_terms(beta, one_minus_beta, p, q, x, limit):
    """Compute beta·forward_kl_terms + one_minus_beta·reverse_kl_terms; neither share is 0."""
    series = second_order(x)
    near = p * (one_minus_beta * (x * x) + series * (one_minus_beta * x + (beta - one_minus_beta)))
    d = q - p
    far = beta * (d - p * tl.minimum(x, limit)) + one_minus_beta * (q * held(x, limit) - d)
    return tl.where(is_near(x), near, tl.maximum(far, 0.0))


@triton.jit
def held(x, limit):
    """Hold x to [-HUGE, limit]; NaN, where both models rule an id out, becomes the limit."""
    return tl.maximum(tl.minimum(x, limit), -HUGE)


@triton.jit
def mixture_ratio(own_share, other_share, x, APPROXIMATE: tl.constexpr):
    """Compute m/own of the mixture m = own_share·own + other_share·other, given ``x = ln(other/own)``.

    Returns:
        its logarithm; what it differs from 1 by; the ratio. Where that is not close to 1, both are of a sum of positive
        terms, in which a small share loses no digits.
    """
    x = tl.minimum(tl.maximum(x, -FAR), FAR)
    e = tl.exp2(x * LOG2_E)
    excess = other_share * tl.where(is_near(x), x + second_order(x), e - 1.0)
    direct = own_share + other_share * e
    # ln(1 + a) = a + a²·P(a): P by interpolation at Chebyshev's nodes, which leaves 3.4e-8 of the logarithm
    series = 0.15586036443710327 + excess * -0.13847944140434265
    series = -0.16612693667411804 + excess * series
    series = 0.19958451390266418 + excess * series
    series = -0.2500068247318268 + excess * series
    series = 0.33333662152290344 + excess * series
    series = -0.5 + excess * series
    close = tl.abs(excess) < CLOSE
    logarithm = tl.where(close, excess + excess * excess * series, log2_of(direct, APPROXIMATE) * LN2)
    return logarithm, excess, tl.where(close, 1.0 + excess, direct)


@triton.jit
def inverse(ratio, excess, APPROXIMATE: tl.constexpr):
    """Compute own/m, exactly 1 where the models are equal, whatever the approximation makes of 1."""
    return tl.where(excess == 0.0, 1.0, reciprocal(ratio, APPROXIMATE))


@triton.jit
def jsd_logarithms(beta, one_minus_beta, x, BETA_ABOVE_HALF: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Compute ln(m/q) and ln(m/p) of m = beta·p + one_minus_beta·q: one from the other, as ln(m/p) = ln(m/q) + x.

    The one computed first is that of the model with the larger share: with β near an end it is the small one, which as
    a difference of the other and x would lose its digits. Far from 0, at x = -87 say, the second is such a difference
    and off by some 1e-5.
    """
    bounded = tl.minimum(tl.maximum(x, -FAR), FAR)
    if BETA_ABOVE_HALF:
        to_p, _, _ = mixture_ratio(beta, one_minus_beta, x, APPROXIMATE)
        to_q = to_p - bounded
    else:
        to_q, _, _ = mixture_ratio(one_minus_beta, beta, -x, APPROXIMATE)
        to_p = to_q + bounded
    return to_q, to_p


@triton.jit
def divergence_terms(
    DIVERGENCE: tl.constexpr, beta, one_minus_beta, p, q, x, limit,
    BETA_ABOVE_HALF: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Compute what one pass over normalised p and q sums up, two numbers an id; ``value_and_centre`` makes use of them.

    Args:
        limit: the largest x of reverse and symmetric KL.
    """
    first = p * 0.0
    second = p * 0.0
    if DIVERGENCE == "forward_kl":
        first = forward_kl_terms(p, q, x)
    elif DIVERGENCE == "reverse_kl":
        first = reverse_kl_terms(p, q, held(x, limit))
    elif DIVERGENCE == "symmetric_kl":
        first = symmetric_kl_terms(beta, one_minus_beta, p, q, x, limit)
    elif DIVERGENCE == "tvd":
        first = tl.abs(difference(p, q, x))
        second = signed(q, x)
    elif DIVERGENCE == "jsd":
        to_q, to_p = jsd_logarithms(beta, one_minus_beta, x, BETA_ABOVE_HALF, APPROXIMATE)
        first = q * to_q
        second = p * to_p
    elif DIVERGENCE == "skew_forward_kl":
        to_p, excess, ratio = mixture_ratio(beta, one_minus_beta, x, APPROXIMATE)
        first = one_minus_beta * difference(p, q, x) - p * to_p
        second = q * inverse(ratio, excess, APPROXIMATE)
    else:  # skew_reverse_kl
        to_q, excess, ratio = mixture_ratio(beta, one_minus_beta, -x, APPROXIMATE)
        first = -q * to_q - one_minus_beta * difference(p, q, x)
        second = q * (beta * (excess * reciprocal(ratio, APPROXIMATE)) - to_q)
    return first, second


@triton.jit
def value_and_centre(DIVERGENCE: tl.constexpr, beta, one_minus_beta, first, second):
    """Return the value of D and the centre of its gradient from sums of the two terms.

    The centre is ``Σ q·h`` with ``h = dD/dq``; for jsd ``Σ q·ln(m/q)``, for skew_forward_kl ``Σ p·q/m``; forward,
    reverse and symmetric KL have none here (the last two have theirs from ``kl_from_statistics``).
    """
    value = first
    centre = second
    if DIVERGENCE == "tvd":
        value = 0.5 * first
        centre = 0.5 * second
    elif DIVERGENCE == "jsd":
        value = -(beta * second + one_minus_beta * first)
        centre = first
    return value, centre


@triton.jit
def divergence_gradient(
    DIVERGENCE: tl.constexpr, weight, beta, one_minus_beta, p, q, x, centre, limit,
    BETA_ABOVE_HALF: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Compute weight·dD/dz, z = s/T, which is ``weight·q·(h - centre)``; what all ids share is multiplied first.

    Args:
        centre: from ``value_and_centre``; for skew_forward_kl divided by Σ q; for reverse and symmetric KL ``Σ q·x``.
            It is subtracted from what it is the mean of, so that nothing is left where one id has all of q.
        limit: the largest x that reverse and symmetric KL may use.
    """
    if DIVERGENCE == "forward_kl":
        grad = weight * difference(p, q, x)
    elif DIVERGENCE == "reverse_kl":
        grad = weight * (q * (held(x, limit) - centre))
    elif DIVERGENCE == "symmetric_kl":
        grad = (weight * beta) * difference(p, q, x)
        grad += (weight * one_minus_beta) * (q * (held(x, limit) - centre))
    elif DIVERGENCE == "tvd":
        grad = weight * (q * (signed(0.5, x) - centre))
    elif DIVERGENCE == "jsd":
        to_q, _ = jsd_logarithms(beta, one_minus_beta, x, BETA_ABOVE_HALF, APPROXIMATE)
        grad = (weight * one_minus_beta) * (q * (centre - to_q))
    elif DIVERGENCE == "skew_forward_kl":
        _, excess, ratio = mixture_ratio(beta, one_minus_beta, x, APPROXIMATE)
        grad = (weight * one_minus_beta) * (q * (centre - inverse(ratio, excess, APPROXIMATE)))
    else:  # skew_reverse_kl
        to_q, excess, ratio = mixture_ratio(beta, one_minus_beta, -x, APPROXIMATE)
        grad = weight * (q * (beta * (excess * reciprocal(ratio, APPROXIMATE)) - to_q - centre))
    return grad


@triton.jit
def signed(value, x):
    """Return value·sign(x), 0 where x is NaN."""
    return tl.where(x > 0.0, value, tl.where(x < 0.0, -value, 0.0))


@triton.jit
def gap_of(d_s, d_t):
    """Compute ln(d_t/d_s), exactly 0 where both are equal; a GPU's plain division is off by two roundings."""
    return tl.where(d_t == d_s, 0.0, tl.log2(tl.div_rn(d_t, d_s)) * LN2)


@triton.jit
def not_negative(x):
    """Return max(x, 0), and NaN for NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def cross_entropy(logit, largest, normaliser):
    """Compute -ln softmax of the label's logit at T = 1."""
    return (tl.log2(normaliser) - (logit - largest) * LOG2_E) * LN2


@triton.jit
def infinite_where(condition, value):
    """Return +inf where the condition holds, NaN where `value` is NaN, and else `value`."""
    return tl.where(condition, value + float("inf"), value)


@triton.jit
def nan_unless_number(normalisers, value):
    """Return NaN where the sums of exponentials are, which show NaN in any logit, and else `value`."""
    return tl.where(normalisers == normalisers, value, float("nan"))
