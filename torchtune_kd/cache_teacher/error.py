"""Measure what a cache loses, on a sample of the teacher's own states; the manifest keeps it.

With p the teacher's probabilities from its states and p' those from what is stored, both at T = 1, over the sample:

    kl_mean, kl_max    mean and largest KL(p || p'), in nats
    top1_changed       share of tokens whose most likely id is another one
    gradient_error     |p' - p| / |p - y| (Frobenius norms), with y the labels one-hot: the error of a student's logit
                       gradient, relative to the teacher's own of the cross-entropy

Of log-probabilities there is no such error without a student; what is not stored is measured instead:

    mass_outside       at each temperature, the mean probability of the ids that are not stored (of drawn ids: of those
                       that were not drawn, on average Σ p (1 - p)^N)

Shapes: n tokens of the sample, D hidden width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtune_kd.losses.signals import Head

SAMPLE = 4096  # tokens
_ROWS = 256  # at a time: their logits are there whole


@torch.no_grad()
def error_of(states: Tensor, stored: Tensor, labels: Tensor, head: Head) -> dict[str, float]:
    """Return the figures above.

    Args:
        states (Tensor): [n, D], as the teacher gave them.
        stored (Tensor): [n, D], what comes back from the cache.
        labels (Tensor): [n] ids.
        head (Head): of the teacher, in any floating dtype; the arithmetic is fp32.
    """
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    kl: list[Tensor] = []
    changed = wrong = whole = torch.zeros((), dtype=torch.float64, device=states.device)
    for begin in range(0, len(states), _ROWS):
        rows = slice(begin, begin + _ROWS)
        log_p, log_q = (
            torch.log_softmax(torch.nn.functional.linear(each[rows].float(), weight, bias), -1)
            for each in (states, stored)
        )
        p, q = log_p.exp(), log_q.exp()
        # Σ q - Σ p is 0 but for rounding, and takes that of the normalisers out of the sum
        kl.append((p * (log_p - log_q) + q - p).sum(-1).clamp(min=0))
        changed = changed + (p.argmax(-1) != q.argmax(-1)).sum()
        wrong = wrong + (q - p).double().square().sum()
        p[torch.arange(len(p), device=p.device), labels[rows]] -= 1
        whole = whole + p.double().square().sum()
    every = torch.cat(kl)
    return {
        "tokens": len(states),
        "kl_mean": float(every.mean()),
        "kl_max": float(every.max()),
        "top1_changed": float(changed / len(states)),
        "gradient_error": float((wrong / whole.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()),
    }


def said(error: dict[str, float]) -> str:
    """Say the figures in a sentence."""
    return (
        f"What is stored differs from what the teacher gave, on {error['tokens']:,} tokens: KL {error['kl_mean']:.2g} "
        "nats "
        f"on average, {error['kl_max']:.2g} at most, another most likely token at {error['top1_changed']:.2%}, error "
        f"of the gradient {error['gradient_error']:.2%}."
    )


@torch.no_grad()
def mass_of(states: Tensor, head: Head, stored: int, temperatures: Sequence[float]) -> dict[str, float]:
    """Return ``tokens`` and the mass outside of what is stored.

    Args:
        states (Tensor): [n, D], as the teacher gave them.
        head (Head): of the teacher.
        stored (int): the likeliest ids, or, without temperatures, the draws.
        temperatures (Sequence[float]): at which the mass is wanted.
    """
    sums: dict[str, float] = {}
    for begin in range(0, len(states), _ROWS):
        rows = states[begin : begin + _ROWS].float()
        logits = torch.nn.functional.linear(rows, head.weight.float(), None if head.bias is None else head.bias.float())
        if not temperatures:
            p = torch.softmax(logits, -1)
            sums["mass_outside"] = sums.get("mass_outside", 0.0) + float((p * (1 - p) ** stored).sum())
        for temperature in temperatures:
            name = f"mass_outside at T={temperature:g}"
            inside = torch.softmax(logits / temperature, -1).topk(stored, -1).values.sum()
            sums[name] = sums.get(name, 0.0) + len(rows) - float(inside)
    return {"tokens": len(states)} | {name: total / len(states) for name, total in sums.items()}


def said_of_mass(kind: str, error: dict[str, float]) -> str:
    """Say the mass in a sentence."""
    masses = ", ".join(
        f"{value:.2%}" + name.removeprefix("mass_outside") for name, value in error.items() if name != "tokens"
    )
    what = "drawn ids" if kind == "sampled" else "stored ids"
    return f"Outside of the {what}, on {error['tokens']:,} tokens: {masses} of the teacher's probability."
