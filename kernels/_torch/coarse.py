"""The student's logits in cells: the stored ids one by one, and all others, the rest, as one.

Legend: n rows of a block, V vocabulary, k stored ids, m = k + 1 cells, R the rest; w the softmax of the rest alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .block import LOG2_E
from .divergences import Softmax


class Rest(NamedTuple):
    """Hold what the rest's logits come to at one temperature.

    Attributes:
        largest (Tensor): ``[n, 1]``, max_R s; finite also where no id is left.
        total (Tensor): ``[n, 1]``, Σ_R exp((s - largest)/T); 0 where no id is left.
        entropy (Tensor | None): ``[n]``, of w, if it was asked for.
    """

    largest: Tensor
    total: Tensor
    entropy: Tensor | None


class Gathered(NamedTuple):
    """Hold what is taken from a block's logits, in the working dtype but for ids.

    Attributes:
        stored (Tensor): ``[n, k]``, logits of the stored ids, -inf at padding.
        label (Tensor | None): ``[n, 1]``, the label's logit, where the cross-entropy is wanted.
        first (Tensor | None): ``[n]`` int64, the first id with the row's largest logit, where agreement is wanted.
        at_t (Rest | None): the rest at T, where a divergence is wanted.
        at_1 (Rest | None): the rest at T = 1, where it is wanted and is not `at_t`.
    """

    stored: Tensor
    label: Tensor | None
    first: Tensor | None
    at_t: Rest | None
    at_1: Rest | None


class Gradient(NamedTuple):
    """Hold the gradient by a block's logits as the numbers of each row that make it.

    Attributes:
        stored (Tensor): ``[n, k]``, by the stored logits, without what the label adds.
        share_t (Tensor | None): ``[n, 1]``, what multiplies exp((s - max_R s)/T) of the rest.
        share_1 (Tensor | None): ``[n, 1]``, the same at T = 1, where `share_t` does not hold it.
        label (Tensor | None): ``[n, 1]``, what is subtracted at the label, stored or not.
    """

    stored: Tensor
    share_t: Tensor | None
    share_1: Tensor | None
    label: Tensor | None


class Coarse(NamedTuple):
    """Hold the student's cells at one temperature.

    Attributes:
        cells (Softmax): of the m cells; its logits are relative to `largest`, over T.
        rest (Rest): the last cell.
        largest (Tensor): ``[n, 1]``, the row's largest logit.
    """

    cells: Softmax
    rest: Rest
    largest: Tensor


def stored_logits(logits: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the stored ids' logits ``[n, k]``, -inf at padding, which is V in `ids`."""
    vocab = logits.shape[-1]
    return logits.gather(-1, ids.clamp(max=vocab - 1)).to(dtype).masked_fill_(ids == vocab, -torch.inf)


def coarse(stored: Tensor, rest: Rest, temperature: float) -> Coarse:
    """Compute the student's cells at a temperature.

    Args:
        stored (Tensor): ``[n, k]``, from :func:`stored_logits`.
        rest (Rest): at that temperature.
        temperature (float): T.
    """
    u = torch.cat([stored, rest.largest], -1)
    largest = u.amax(-1, keepdim=True)
    u.sub_(largest).div_(temperature)
    prob = u.exp()
    # the rest's by a product: in a logarithm of -25, its mass of 1e-11 would lose the seventh digit
    prob[:, -1:] *= rest.total
    u[:, -1:] += rest.total.log()
    mass = prob.sum(-1, keepdim=True)
    return Coarse(Softmax(u, prob.div_(mass), mass), rest, largest)


def rest_entropy(total: Tensor, moment: Tensor) -> Tensor:
    """Compute the entropy of w ``[n]`` at T = 1 from Σ e ``[n, 1]`` and Σ e·(s - max_R s), e = exp(s - max_R s)."""
    return (total.log() - moment / total).where(total != 0.0, 0.0).squeeze(-1)


def likeliest(scores: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """Return the id with the largest score ``[n]``, the first one of ties; `vocab` where there is none but padding."""
    scores = scores.masked_fill(ids == vocab, -torch.inf)
    return ids.where(scores == scores.amax(-1, keepdim=True), vocab).amin(-1)


def sum_rest(logits: Tensor, ids: Tensor, temperature: float, rest: Tensor, scratch: Tensor | None) -> Rest:
    """Sum up the rest at a temperature.

    Args:
        logits (Tensor): ``[n, V]``.
        ids (Tensor): ``[n, k]`` int64, V for padding.
        temperature (float): T.
        rest (Tensor): ``[n, V + 1]``, receives exp((s - max_R s)/T) of the ids of the rest, 0 elsewhere.
        scratch (Tensor | None): ``[n, V + 1]``, to compute the rest's entropy with; None for none.
    """
    vocab = logits.shape[-1]
    rest[:, :vocab].copy_(logits)
    rest[:, vocab:] = -torch.inf
    rest.scatter_(-1, ids, -torch.inf)
    # finite where no id is left, so that their difference is -inf and no NaN
    top = rest.amax(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).min)
    rest.sub_(top)
    if temperature != 1.0:
        rest.div_(temperature)
    if scratch is not None:
        scratch.copy_(rest)
    rest.mul_(LOG2_E).exp2_()  # on a CPU half the time of exp
    total = rest.sum(-1, keepdim=True)
    entropy = None
    if scratch is not None:
        moment = scratch.clamp_(min=torch.finfo(rest.dtype).min).mul_(rest).sum(-1, keepdim=True)
        entropy = rest_entropy(total, moment)
    return Rest(top, total, entropy)


def share_of(rest: Rest, slope: Tensor) -> Tensor:
    """Return what multiplies the rest's exponentials ``[n, 1]``; 0 where no id is left."""
    return (slope[:, -1:] / rest.total).where(rest.total != 0.0, 0.0)
