"""What a distillation run is watched by, one number per token, all at T = 1.

Legend: n rows of a block, V vocabulary; p teacher, q student.
"""

import math

import torch
from torch import Tensor

from .divergences import Distributions, Softmax, divergence


def entropy(of: Softmax, x: Tensor) -> Tensor:
    """Compute -Σ p·log p ``[n]`` in nats, as log Σ exp(u) - Σ p·u; `x` is scratch ``[n, V]``."""
    # a finite u where p is 0, so that their product is 0 and only a NaN gives a NaN
    mean = torch.clamp(of.u, min=torch.finfo(of.u.dtype).min, out=x).mul_(of.prob).sum(-1)
    return of.total.log().squeeze(-1) - mean


def kl(dist: Distributions, r: Tensor, x: Tensor) -> Tensor:
    """Compute KL(p‖q) ``[n]`` in nats; `r` and `x` are scratch ``[n, V]``."""
    return divergence("forward_kl", None, dist, r, x, None)


def acceptance_rate(dist: Distributions, x: Tensor) -> Tensor:
    """Sum min(p, q) ``[n]``, the expected acceptance rate of speculative decoding (Leviathan et al. 2023)."""
    return torch.minimum(dist.p, dist.q, out=x).sum(-1)


def top1_agreement(dist: Distributions) -> Tensor:
    """Return whether both models rank the same id first ``[n]``, at any temperature. Of ties the first id counts."""
    return first_argmax(dist.teacher.u) == first_argmax(dist.student.u)


def first_argmax(values: Tensor) -> Tensor:
    """Compute ``values.argmax(-1)`` of ``[n, V]`` in a fifth of its time on a CPU, which is that of ten maxima.

    The first run of ids that holds the maximum is found first, then the id within it.
    """
    vocab = values.shape[-1]
    run = math.isqrt(vocab)  # ids per partial maximum
    whole = vocab // run * run
    tops = values[:, :whole].unflatten(-1, (-1, run)).amax(-1)
    if whole < vocab:
        tops = torch.cat([tops, values[:, whole:].amax(-1, keepdim=True)], -1)
    # the last run may be short: it is read together with ids before it, all of which are smaller
    start = (tops.argmax(-1, keepdim=True) * run).clamp_(max=vocab - run)
    within = values.gather(-1, start + torch.arange(run, device=values.device)).argmax(-1)
    return start.squeeze(-1) + within
