r"""The seven divergences: value and gradient, each formula once.

Legend: n rows of a block, V vocabulary; p teacher, q student, both softmaxes of logits divided by T;
z = s/T the scaled student logits; ``r = log(q/p)``.

For any :math:`D(q)` with :math:`h_j = \partial D/\partial q_j` the gradient with respect to z is
:math:`q_j\,(h_j - \sum_k q_k h_k)`, so constants in h do not matter.

Every KL is summed with the terms of its generalised form, which adds the masses: ``KL(a||b) = Σ a·log(a/b) +
b - a``. The masses cancel exactly in real numbers; in floating point they also cancel the first-order effect
of a normaliser that is rounded, which is what makes a KL of 1e-3 and less come out right in fp32. Where nothing
but the loss is wanted (:func:`kl_from_exponentials`) that costs too much.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._objective import BEYOND_FINITE
from .._plan import host_can_read

# Stands for a ratio x/0. In fp32 no two ids that both have a probability reach it.
_MAX_RATIO = 1e30
# Below this weight of its first member log(mixture/member) is taken where 1 + (difference) would cancel.
_SMALL_WEIGHT = 0.01
_INF = float("inf")
# On CPUs PyTorch 2.6 takes log1p of an fp32 number above 1e38 for infinite.
_LOG1P_OVERFLOWS = torch.__version__ < "2.7"


# The divergences that are β·KL(p‖q) + (1-β)·KL(q‖p), and the β of those that have none of their own.
KULLBACK_LEIBLER = {"forward_kl": 1.0, "reverse_kl": 0.0, "symmetric_kl": None}


class Softmax(NamedTuple):
    """Hold softmax(u) of a block's rows, in the working dtype (fp32 or fp64).

    Attributes:
        u (Tensor): ``[n, V]``, logits over T less the row's largest.
        prob (Tensor): ``[n, V]``, exp(u) / total.
        total (Tensor): ``[n, 1]``, Σ exp(u).
    """

    u: Tensor
    prob: Tensor
    total: Tensor


class Distributions(NamedTuple):
    """Hold teacher p and student q of one block."""

    teacher: Softmax
    student: Softmax

    @property
    def p(self) -> Tensor:
        """The teacher's probabilities ``[n, V]``."""
        return self.teacher.prob

    @property
    def q(self) -> Tensor:
        """The student's probabilities ``[n, V]``."""
        return self.student.prob


def _log_ratio(dist: Distributions, out: Tensor) -> Tensor:
    """Compute log(q/p) ``[n, V]``, in `out`.

    The totals enter as the logarithm of their ratio, which is as small as the models are close; as two logarithms they
    would leave the rounding of either in every term, where nothing cancels it.
    """
    return torch.sub(dist.student.u, dist.teacher.u, out=out).add_(_shift(dist))


def _shift(dist: Distributions) -> Tensor:
    """Compute the totals' part of log(q/p) ``[n, 1]``."""
    p, q = dist.teacher.total, dist.student.total
    gap = p - q
    return torch.copysign(torch.log1p(gap.abs() / torch.minimum(p, q)), gap)


def divergence(name: str, beta: float | None, dist: Distributions, r: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """Compute D(p, q) of every row, and its gradient with respect to z = s/T.

    An id at -inf in both models contributes nothing. Where the mathematics says +inf (forward KL with p > 0
    and q = 0, reverse KL with q > 0 and p = 0) the value is +inf; the gradient is then that of the forward
    KL's finite limit, q - p, and for the reverse KL that of a log-ratio 80 above the row's largest finite one
    (or above 0): finite, and it points where the limit points.

    Args:
        name (str): what ``Objective.computed_divergence`` says.
        beta (float | None): its parameter.
        dist (Distributions): left as they are.
        r (Tensor): scratch ``[n, V]``.
        x (Tensor): scratch ``[n, V]``.
        grad (Tensor | None): receives the gradient ``[n, V]``; None to compute the value alone.

    Returns:
        Tensor: ``[n]``, never negative.
    """
    if name in KULLBACK_LEIBLER:
        return _kl_mixture(_share(name, beta), dist, r, x, grad)
    if name == "tvd":
        return _tvd(dist, x, grad)
    # Σ q - Σ p, zero but for rounding, see the head of this file
    mass = torch.sub(dist.q, dist.p, out=r).sum(-1)
    mixtures = {"jsd": _jsd, "skew_forward_kl": _skew_forward_kl, "skew_reverse_kl": _skew_reverse_kl}
    return mixtures[name](_share(name, beta), dist, mass, r, x, grad)


def _share(name: str, beta: float | None) -> float:
    """Return β of a divergence that has one: its own parameter, or what :data:`KULLBACK_LEIBLER` says."""
    fixed = KULLBACK_LEIBLER.get(name)
    share = beta if fixed is None else fixed
    assert share is not None  # an Objective has filled in the default
    return share


def _expect(weight: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """Sum weight·value ``[n]`` with 0·(±inf) = 0; `out` is scratch."""
    total = torch.mul(weight, value, out=out).sum(-1)
    if host_can_read(out.device) and bool(total.isfinite().all()):
        return total
    return out.nan_to_num_(nan=0.0, posinf=_INF, neginf=-_INF).sum(-1)


def _centred(q: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """Compute q·(h - Σ q·h) ``[n, V]``, in h; `x` is scratch."""
    mean = torch.mul(q, h, out=x).sum(-1, keepdim=True)
    return h.sub_(mean).mul_(q)


def _kl_mixture(beta: float, dist: Distributions, r: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """Compute β·KL(p‖q) + (1-β)·KL(q‖p); gradient β·(q - p) + (1-β)·q·(r - Σ q·r)."""
    q_minus_p = torch.sub(dist.q, dist.p, out=x if grad is None else grad)
    mass = q_minus_p.sum(-1)
    _log_ratio(dist, out=r)
    value = torch.zeros_like(mass)
    if beta > 0.0:
        value.add_((mass - _expect(dist.p, r, out=x)).clamp_(min=0.0), alpha=beta)
    if beta < 1.0:
        value.add_((_expect(dist.q, r, out=x) - mass).clamp_(min=0.0), alpha=1.0 - beta)
        if grad is not None:
            largest = torch.nan_to_num(r, nan=0.0, posinf=0.0, neginf=0.0, out=x).amax(-1, keepdim=True)
            # where r is -inf q is 0, and any finite number will do
            r.nan_to_num_(nan=0.0).clamp_(max=largest.add_(BEYOND_FINITE))
            grad.mul_(beta).add_(_centred(dist.q, r, x), alpha=1.0 - beta)
    return value


def kl_from_exponentials(name: str, beta: float | None, dist: Distributions, r: Tensor, x: Tensor) -> Tensor:
    """Compute the KLs of :func:`divergence` ``[n]`` from a ``prob`` not divided by ``total``: five passes less.

    Without the masses' terms the rounding of the totals stays: some 1e-7, whatever the KL.
    """
    share = _share(name, beta)
    torch.sub(dist.student.u, dist.teacher.u, out=r)
    shift = _shift(dist)[:, 0]
    value = torch.zeros_like(shift)
    if share > 0.0:
        mean = _expect(dist.p, r, out=r if share == 1.0 else x) / dist.teacher.total[:, 0]
        value.sub_(mean + shift, alpha=share)
    if share < 1.0:
        mean = _expect(dist.q, r, out=r) / dist.student.total[:, 0]
        value.add_(mean + shift, alpha=1.0 - share)
    # a NaN among the logits is one in its row's total, and _expect takes no notice of it
    totals = (dist.teacher.total + dist.student.total)[:, 0]
    return value.clamp_(min=0.0).add_(totals, alpha=0.0)


def _tvd(dist: Distributions, x: Tensor, grad: Tensor | None) -> Tensor:
    """Compute ½ Σ |q - p|; h = ½ sign(q - p)."""
    torch.sub(dist.q, dist.p, out=x)
    if grad is not None:
        torch.sign(x, out=grad).mul_(0.5)
    value = x.abs_().sum(-1).mul_(0.5)
    if grad is not None:
        _centred(dist.q, grad, x)
    return value


# The three below mix m = a·p + (1-a)·q and start from `d` = q - p. With the relative difference d/p,
# log(m/p) = log1p((1-a)·d/p) and log(m/q) = log1p(-a·d/q): no logarithm of a rounded m, and 0 where p = q.


def _log_mixture(
    weight: float,
    slope: float,
    d: Tensor,
    other: Tensor,
    to: Tensor,
    out: Tensor,
    one_minus_ratio: Tensor | None = None,
) -> Tensor:
    """Compute log(m/to) ``[n, V]`` of the mixture m = weight·to + (1-weight)·other, finite, and 0 where both are 0.

    Args:
        weight (float): share of `to`, above 0.
        slope (float): m = to + slope·d, so that |slope| is 1 - weight.
        d (Tensor): ±(other - to); may be `out`.
        other (Tensor): the second distribution.
        to (Tensor): the first one.
        out (Tensor): receives the result.
        one_minus_ratio (Tensor | None): receives 1 - to/m ``[n, V]``.
    """
    torch.div(d, to, out=out)
    out.nan_to_num_(nan=0.0, posinf=_MAX_RATIO, neginf=-_MAX_RATIO).mul_(slope)
    if _LOG1P_OVERFLOWS:
        out.clamp_(max=_MAX_RATIO)
    if weight >= _SMALL_WEIGHT:
        if one_minus_ratio is not None:
            torch.div(out, torch.add(out, 1.0, out=one_minus_ratio), out=one_minus_ratio)
        return out.log1p_()
    # where `other` is far below `to`, 1 + (m/to - 1) cancels down to `weight` and less; m/to is at least that
    cancels = out < -0.5
    direct = torch.div(other, to).mul_(1.0 - weight).add_(weight).log_().clamp_(min=math.log(weight))
    torch.where(cancels, direct, out.log1p_(), out=out)
    if one_minus_ratio is not None:
        torch.neg(out, out=one_minus_ratio).expm1_().neg_().clamp_(min=-_MAX_RATIO)
    return out


def _jsd(beta: float, dist: Distributions, mass: Tensor, d: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """Compute β·KL(p‖m) + (1-β)·KL(q‖m), m = βp + (1-β)q; h = (1-β)·log(q/m). Agarwal et al. 2024 (GKD)."""
    _log_mixture(beta, 1.0 - beta, d, dist.q, dist.p, out=x)
    value = -beta * (x.mul_(dist.p).sum(-1) - (1.0 - beta) * mass).clamp_(max=0.0)
    _log_mixture(1.0 - beta, -beta, d, dist.p, dist.q, out=d).neg_()  # log(q/m)
    value += (1.0 - beta) * (torch.mul(d, dist.q, out=x).sum(-1) - beta * mass).clamp_(min=0.0)
    if grad is not None:
        grad.copy_(_centred(dist.q, d, x)).mul_(1.0 - beta)
    return value


def _skew_forward_kl(
    beta: float, dist: Distributions, mass: Tensor, d: Tensor, x: Tensor, grad: Tensor | None
) -> Tensor:
    """Compute KL(p‖m), m = βp + (1-β)q; h = -(1-β)·p/m. Ko et al. 2024 (DistiLLM)."""
    _log_mixture(beta, 1.0 - beta, d, dist.q, dist.p, out=d)
    value = ((1.0 - beta) * mass - d.mul_(dist.p).sum(-1)).clamp_(min=0.0)
    if grad is None:
        return value
    # lerp from the larger share: in fp32 1 - (a weight near 1) has lost digits
    m = torch.lerp(dist.q, dist.p, beta, out=x) if beta < 0.5 else torch.lerp(dist.p, dist.q, 1.0 - beta, out=x)
    # q·p/m as p·(q/m), which cannot overflow. q/0 comes at β = 1 alone, where the gradient is 0 times this.
    torch.div(dist.q, m, out=x).nan_to_num_(nan=0.0, posinf=0.0).mul_(dist.p)
    # divided by Σ q, so that both terms are equal to the last bit where p = q
    mean = x.sum(-1, keepdim=True) / dist.q.sum(-1, keepdim=True)
    torch.mul(dist.q, mean, out=grad).sub_(x).mul_(1.0 - beta)
    return value


def _skew_reverse_kl(
    beta: float, dist: Distributions, mass: Tensor, d: Tensor, x: Tensor, grad: Tensor | None
) -> Tensor:
    """Compute KL(q‖m), m = (1-β)p + βq; h = log(q/m) - β·q/m. Ko et al. 2024 (DistiLLM)."""
    _log_mixture(beta, beta - 1.0, d, dist.p, dist.q, out=d, one_minus_ratio=grad).neg_()  # log(q/m), and 1 - q/m
    value = (torch.mul(d, dist.q, out=x).sum(-1) - (1.0 - beta) * mass).clamp_(min=0.0)
    if grad is not None:
        _centred(dist.q, grad.mul_(beta).add_(d), x)  # h + β, which is 0 where p = q
    return value
