r"""The seven divergences: value and gradient, each formula once.

Legend: n rows of a block, V vocabulary; p teacher, q student, both softmaxes of logits divided by T;
z = s/T the scaled student logits; ``r = log(q/p)``.

For any :math:`D(q)` with :math:`h_j = \partial D/\partial q_j` the gradient with respect to z is
:math:`q_j\,(h_j - \sum_k q_k h_k)`, so constants in h do not matter.

Every KL is summed with the terms of its generalised form, which adds the masses: ``KL(a||b) = Σ a·log(a/b) +
b - a``. The masses cancel exactly in real numbers; in floating point they also cancel the first-order effect
of a normaliser that is rounded, which is what makes a KL of 1e-3 and less come out right in fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Stand for infinity where it would meet a probability of 0 or make a gradient infinite. In fp32 neither is
# reached by two ids that both have a probability.
_MAX_LOG_RATIO = 80.0
_MAX_RATIO = 1e30
_INF = float("inf")


class Distributions(NamedTuple):
    """Teacher p and student q of one block, all ``[n, V]`` in the working dtype (fp32 or fp64)."""

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor


def divergence(name: str, beta: float | None, dist: Distributions, r: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """D(p, q) of every row, and its gradient with respect to z = s/T.

    An id at -inf in both models contributes nothing. Where the mathematics says +inf (forward KL with p > 0
    and q = 0, reverse KL with q > 0 and p = 0) the value is +inf; the gradient is then that of the forward
    KL's finite limit, q - p, and for the reverse KL that of a log-ratio of 80: finite, and it points where
    the limit points.

    Args:
        name (str): the divergence.
        beta (float | None): its parameter.
        dist (Distributions): left as they are.
        r (Tensor): scratch ``[n, V]``.
        x (Tensor): scratch ``[n, V]``.
        grad (Tensor | None): receives the gradient ``[n, V]``; None to compute the value alone.

    Returns:
        Tensor: ``[n]``, never negative.
    """
    if name == "jsd" and beta in (0.0, 1.0):  # by convention: the divergence itself vanishes there
        name = "forward_kl" if beta == 0.0 else "reverse_kl"
    elif name in ("skew_forward_kl", "skew_reverse_kl") and beta == 0.0:
        name = name.removeprefix("skew_")
    if name == "forward_kl":
        return _kl_mixture(1.0, dist, r, x, grad)
    if name == "reverse_kl":
        return _kl_mixture(0.0, dist, r, x, grad)
    if name == "symmetric_kl":
        return _kl_mixture(beta, dist, r, x, grad)
    if name == "tvd":
        return _tvd(dist, x, grad)
    # Σ q - Σ p, zero but for rounding, see the head of this file
    mass = torch.sub(dist.q, dist.p, out=r).sum(-1)
    mixtures = {"jsd": _jsd, "skew_forward_kl": _skew_forward_kl, "skew_reverse_kl": _skew_reverse_kl}
    return mixtures[name](beta, dist, mass, r, x, grad)


def _expect(weight: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """Σ weight·value ``[n]`` with 0·(±inf) = 0; `out` is scratch."""
    torch.mul(weight, value, out=out)
    return out.nan_to_num_(nan=0.0, posinf=_INF, neginf=-_INF).sum(-1)


def _centred(q: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """q·(h - Σ q·h) ``[n, V]``, in h; `x` is scratch."""
    mean = torch.mul(q, h, out=x).sum(-1, keepdim=True)
    return h.sub_(mean).mul_(q)


def _kl_mixture(beta: float, dist: Distributions, r: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """β·KL(p‖q) + (1-β)·KL(q‖p); gradient β·(q - p) + (1-β)·q·(r - Σ q·r)."""
    q_minus_p = torch.sub(dist.q, dist.p, out=x if grad is None else grad)
    mass = q_minus_p.sum(-1)
    torch.sub(dist.log_q, dist.log_p, out=r)
    value = torch.zeros_like(mass)
    if beta > 0.0:
        value.add_((mass - _expect(dist.p, r, out=x)).clamp_(min=0.0), alpha=beta)
    if beta < 1.0:
        value.add_((_expect(dist.q, r, out=x) - mass).clamp_(min=0.0), alpha=1.0 - beta)
        if grad is not None:
            r.nan_to_num_(nan=0.0, posinf=_MAX_LOG_RATIO, neginf=-_MAX_LOG_RATIO)
            grad.mul_(beta).add_(_centred(dist.q, r, x), alpha=1.0 - beta)
    return value


def _tvd(dist: Distributions, x: Tensor, grad: Tensor | None) -> Tensor:
    """½ Σ |q - p|; h = ½ sign(q - p)."""
    torch.sub(dist.q, dist.p, out=x)
    if grad is not None:
        torch.sign(x, out=grad).mul_(0.5)
    value = x.abs_().sum(-1).mul_(0.5)
    if grad is not None:
        _centred(dist.q, grad, x)
    return value


# The three below mix m = a·p + (1-a)·q and start from `d` = q - p. With the relative difference d/p,
# log(p/m) = -log1p((1-a)·d/p) and log(q/m) = -log1p(-a·d/q): no logarithm of a rounded m, and 0 where p = q.


def _relative(d: Tensor, to: Tensor, out: Tensor) -> Tensor:
    """d/to ``[n, V]`` with 0/0 = 0, and large but finite where only `to` is 0."""
    torch.div(d, to, out=out)
    return out.nan_to_num_(nan=0.0, posinf=_MAX_RATIO, neginf=-_MAX_RATIO)


def _jsd(beta: float, dist: Distributions, mass: Tensor, d: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """β·KL(p‖m) + (1-β)·KL(q‖m), m = βp + (1-β)q; h = (1-β)·log(q/m). Agarwal et al. 2024 (GKD)."""
    _relative(d, dist.p, out=x).mul_(1.0 - beta).log1p_()  # -log(p/m)
    value = -beta * (x.mul_(dist.p).sum(-1) - (1.0 - beta) * mass).clamp_(max=0.0)
    _relative(d, dist.q, out=d).mul_(-beta).log1p_().neg_()  # log(q/m)
    value += (1.0 - beta) * (torch.mul(d, dist.q, out=x).sum(-1) - beta * mass).clamp_(min=0.0)
    if grad is not None:
        grad.copy_(_centred(dist.q, d, x)).mul_(1.0 - beta)
    return value


def _skew_forward_kl(
    beta: float, dist: Distributions, mass: Tensor, d: Tensor, x: Tensor, grad: Tensor | None
) -> Tensor:
    """KL(p‖m), m = βp + (1-β)q; h = -(1-β)·p/m. Ko et al. 2024 (DistiLLM)."""
    _relative(d, dist.p, out=d).mul_(1.0 - beta)  # m/p - 1
    value = ((1.0 - beta) * mass - torch.log1p(d, out=x).mul_(dist.p).sum(-1)).clamp_(min=0.0)
    if grad is not None:
        d.div_(torch.add(d, 1.0, out=x))  # 1 - p/m
        grad.copy_(_centred(dist.q, d, x)).mul_(1.0 - beta)
    return value


def _skew_reverse_kl(
    beta: float, dist: Distributions, mass: Tensor, d: Tensor, x: Tensor, grad: Tensor | None
) -> Tensor:
    """KL(q‖m), m = (1-β)p + βq; h = log(q/m) - β·q/m. Ko et al. 2024 (DistiLLM)."""
    _relative(d, dist.q, out=d).mul_(beta - 1.0)  # m/q - 1
    torch.log1p(d, out=x).neg_()  # log(q/m)
    if grad is not None:
        grad.copy_(x)
    value = (x.mul_(dist.q).sum(-1) - (1.0 - beta) * mass).clamp_(min=0.0)
    if grad is not None:
        d.div_(torch.add(d, 1.0, out=x))  # 1 - q/m
        _centred(dist.q, grad.add_(d, alpha=beta), x)
    return value
