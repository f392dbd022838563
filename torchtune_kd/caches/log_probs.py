"""Log-probabilities as they are stored: the likeliest ids of a token with the mass of the rest, or ids that were drawn.

``top_k``: ids and log-probabilities at T = 1 of the k likeliest ids and of the label, and for every temperature that
is to be used the tail

    t_T = log Σ_{j ∉ K} exp(ℓ_j / T),   ℓ = log softmax(z), K the stored ids

which does not follow from the stored ones at another temperature. ``sampled``: ids drawn from softmax(z), with their
counts (Anshumann et al., "Sparse Logit Sampling", 2025).

Shapes: m tokens, V vocabulary, k stored ids, T temperatures, N draws.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NONE = -1  # pads ids


def encode_top_k(logits: Tensor, labels: Tensor, k: int, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Return ``ids`` [m, k + 1] int32, ``log_probs`` [m, k + 1] fp16, ``tail`` [m, T] and ``entropy`` [m], both fp32.

    The last id is the label where it is not among the k likeliest, and -1 where it is.

    Args:
        logits (Tensor): [m, V], of any floating dtype; the arithmetic is fp32.
        labels (Tensor): [m] ids; -1 for none.
        k (int): below V.
        temperatures (Sequence[float]): T of each tail.
    """
    log_probs = torch.log_softmax(logits.float(), -1)
    entropy = -(log_probs.exp() * log_probs).nan_to_num(nan=0.0).sum(-1)
    top, ids = log_probs.topk(k, dim=-1)
    column = labels.unsqueeze(-1)
    stored = (ids == column).any(-1, keepdim=True) | (column < 0)
    of_label = log_probs.gather(-1, column.clamp(min=0))
    ids = torch.cat([ids, column.masked_fill(stored, NONE)], -1)
    top = torch.cat([top, of_label.masked_fill(stored, 0.0)], -1)
    rest = log_probs.scatter(-1, ids.where(ids >= 0, ids[:, :1]), -torch.inf)  # a pad hides the first id once more
    tails = [torch.logsumexp(rest / temperature, -1) for temperature in temperatures]
    return {
        "ids": ids.to(torch.int32),
        "log_probs": top.to(torch.float16),
        "tail": torch.stack(tails, -1) if tails else logits.new_zeros(len(logits), 0, dtype=torch.float32),
        "entropy": entropy,
    }


def encode_sampled(logits: Tensor, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the columns ``ids`` [m, N] int32, ``counts`` [m, N] uint8 and ``entropy`` [m] fp32 of N draws.

    Args:
        logits (Tensor): [m, V], of any floating dtype; the arithmetic is fp32.
        samples (int): N, at most 255.
        generator (torch.Generator): of the logits' device.
    """
    log_probs = torch.log_softmax(logits.float(), -1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).nan_to_num(nan=0.0).sum(-1)
    drawn = torch.multinomial(probs, samples, replacement=True, generator=generator).sort(-1).values
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = new.cumsum(-1) - 1
    ids = torch.full_like(drawn, NONE).scatter(-1, slot, drawn)
    counts = torch.zeros_like(drawn).scatter_add(-1, slot, torch.ones_like(drawn))
    return {"ids": ids.to(torch.int32), "counts": counts.to(torch.uint8), "entropy": entropy}


def trimmed(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of drawn ids without what pads all rows."""
    width = max(1, int((columns["ids"] != NONE).sum(-1).max())) if len(columns["ids"]) else 1
    return {name: column[:, :width] if column.dim() == 2 else column for name, column in columns.items()}


def bytes_per_token(kind: str, k: int | None, temperatures: Sequence[float], samples: int | None) -> int:
    """Return the most that a token takes; drawn ids, of which several are often the same, take less."""
    if kind == "sampled":
        return 5 * (samples or 0) + 4
    return 6 * ((k or 0) + 1) + 4 * len(temperatures) + 4
