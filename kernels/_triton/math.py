"""Arithmetic on a block of ids, shared by all Triton kernels of this folder.

Legend: s, t student and teacher logits; T temperature; q, p their softmaxes; everything is in powers of 2, because
``exp2`` is one instruction on a GPU: ``us = (s - maximum)·log2(e)/T``, ``lq = log2 q``, ``r = log2(q/p)``. ``log2`` is
a function of some twenty instructions on NVIDIA, so that divergences with logarithms of mixtures cost several times
the others.
Padding and ids masked in both models are -inf and contribute nothing. The formulas are those of
``_torch/divergences.py``; README.md derives them.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def weighted(weight, value):
    """Return weight·value with 0·(±inf) = 0."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def expm1(r):
    """Compute 2^r - 1, near 0 by its series: a subtraction would lose the digits there."""
    x = r * LN2
    # at |x| = 0.35 the first term left out, x^8/8!, is 2e-8 of x
    tail = 1.0 + x * 0.14285714285714285
    tail = 1.0 + x * 0.16666666666666666 * tail
    tail = 1.0 + x * 0.2 * tail
    tail = 1.0 + x * 0.25 * tail
    tail = 1.0 + x * 0.3333333333333333 * tail
    tail = 1.0 + x * 0.5 * tail
    return tl.where(tl.abs(r) < 0.5, x * tail, tl.exp2(r) - 1.0)


@triton.jit
def log_mixture(share, own_share, relative, log2_m, log2_own):
    """Compute ln(m/own) of the mixture m = own_share·own + share·other, given ``relative`` = other/own - 1."""
    a = share * relative
    # ln(1 + a) = 2·artanh(a/(2 + a)); at |a| = 0.25 the first term left out is 2e-8 of the sum
    w = a / (2.0 + a)
    square = w * w
    series = 1.0 + square * (0.3333333333333333 + square * (0.2 + square * 0.14285714285714285))
    # m/own is at least own_share, also where m is too small for fp32; -1000 where own_share is, too
    direct = tl.maximum(log2_m - log2_own, tl.maximum(tl.log2(own_share), -1000.0))
    return tl.where(tl.abs(a) < 0.25, 2.0 * w * series, direct * LN2)


@triton.jit
def mixture(p_share, q_share, p, q):
    """Mix p_share·p + q_share·q, whose shares add up to 1; exactly p where q = p."""
    return tl.where(p_share < 0.5, q + p_share * (p - q), p + q_share * (q - p))


@triton.jit
def difference(p, q, r):
    """Compute q - p from the log-ratio where both are close."""
    return tl.where(tl.abs(r) < 0.5, p * expm1(r), q - p)


@triton.jit
def forward_kl_terms(p, d, r):
    """Compute the terms of Σ p·ln(p/q), plus d = q - p: these sum to 0, and make each term of second order in r."""
    return tl.where(p > 0.0, d - p * r * LN2, d)


@triton.jit
def reverse_kl_terms(q, d, r):
    """Compute the terms of Σ q·ln(q/p), minus d = q - p."""
    return weighted(q, r) * LN2 - d


@triton.jit
def divergence_terms(DIVERGENCE: tl.constexpr, beta, one_minus_beta, p, q, lp, lq, r):
    """Compute what one pass over normalised p and q sums up.

    Returns:
        the terms of D; those of the centre of its gradient, ``Σ q·h`` with ``h = dD/dq`` (for skew_forward_kl
        ``Σ p·q/m``), which forward, reverse and symmetric KL do not need.
    """
    value = p * 0.0
    centre = p * 0.0
    d = difference(p, q, r)
    if DIVERGENCE == "forward_kl":
        value = forward_kl_terms(p, d, r)
    elif DIVERGENCE == "reverse_kl":
        value = reverse_kl_terms(q, d, r)
    elif DIVERGENCE == "symmetric_kl":
        # a weight of 0 keeps out a divergence that is +inf
        value = weighted(beta, forward_kl_terms(p, d, r)) + weighted(one_minus_beta, reverse_kl_terms(q, d, r))
    elif DIVERGENCE == "tvd":
        value = 0.5 * tl.abs(d)
        centre = q * _sign_half(d)
    elif DIVERGENCE == "jsd":
        log2_m = tl.log2(mixture(beta, one_minus_beta, p, q))
        to_q = log_mixture(beta, one_minus_beta, expm1(-r), log2_m, lq)
        to_p = log_mixture(one_minus_beta, beta, expm1(r), log2_m, lp)
        value = -(beta * weighted(p, to_p) + one_minus_beta * weighted(q, to_q))
        centre = weighted(q, -one_minus_beta * to_q)
    elif DIVERGENCE == "skew_forward_kl":
        m = mixture(beta, one_minus_beta, p, q)
        value = one_minus_beta * d - weighted(p, log_mixture(one_minus_beta, beta, expm1(r), tl.log2(m), lp))
        centre = _share(p, q, m)
    else:  # skew_reverse_kl
        m = mixture(one_minus_beta, beta, p, q)
        to_q = log_mixture(one_minus_beta, beta, expm1(-r), tl.log2(m), lq)
        value = -weighted(q, to_q) - one_minus_beta * d
        centre = weighted(q, _skew_reverse_slope(beta, one_minus_beta, m, d, to_q))
    return value, centre


@triton.jit
def divergence_gradient(DIVERGENCE: tl.constexpr, beta, one_minus_beta, p, q, lp, lq, r, centre, limit):
    """Compute dD/dz, z = s/T: ``q·(h - centre)``.

    Args:
        centre: ``Σ q·h``; for skew_forward_kl ``Σ (p·q/m) / Σ q``; for reverse and symmetric KL ``Σ q·r``.
        limit: the largest r that reverse and symmetric KL may use.
    """
    d = difference(p, q, r)
    grad = d
    if DIVERGENCE == "reverse_kl":
        grad = weighted(q, tl.minimum(r, limit) - centre) * LN2
    elif DIVERGENCE == "symmetric_kl":
        grad = beta * d + one_minus_beta * weighted(q, tl.minimum(r, limit) - centre) * LN2
    elif DIVERGENCE == "tvd":
        grad = q * (_sign_half(d) - centre)
    elif DIVERGENCE == "jsd":
        to_q = log_mixture(beta, one_minus_beta, expm1(-r), tl.log2(mixture(beta, one_minus_beta, p, q)), lq)
        grad = weighted(q, -one_minus_beta * to_q - centre)
    elif DIVERGENCE == "skew_forward_kl":
        grad = one_minus_beta * (q * centre - _share(p, q, mixture(beta, one_minus_beta, p, q)))
    elif DIVERGENCE == "skew_reverse_kl":
        m = mixture(one_minus_beta, beta, p, q)
        to_q = log_mixture(one_minus_beta, beta, expm1(-r), tl.log2(m), lq)
        grad = weighted(q, _skew_reverse_slope(beta, one_minus_beta, m, d, to_q) - centre)
    return grad


@triton.jit
def _sign_half(d):
    """Return ½·sign(d)."""
    return tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))


@triton.jit
def _share(p, q, m):
    """Compute p·q/m, exactly p where q = p."""
    return tl.where(p == q, p, tl.where(m > 0.0, p * (q / m), 0.0))


@triton.jit
def _skew_reverse_slope(beta, one_minus_beta, m, d, to_q):
    """Compute h = ln(q/m) - β·q/m, plus β, so that it is 0 where p = q."""
    # below, 1/m leaves fp32; it is the teacher's zeros there that make m so small
    return -to_q - tl.where(m > 1.0e-37, beta * one_minus_beta * (d / m), one_minus_beta)
