"""The cases that both functions of the kernels are tested on.

Legend: N tokens, V vocabulary.
"""

import itertools
import random

import torch

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

VALUES = {
    # one id (nothing to learn), below a vector register and odd, no power of two, several blocks of rows
    "v": (1, 7, 1000, 4096),
    # nothing, one, and one more than a multiple of any block
    "n": (0, 1, 3, 129),
    "t": (0.5, 1.0, 2.0, 8.0),
    # cross-entropy alone, both, distillation alone
    "kd_ratio": (0.0, 0.3, 1.0),
    "labels": ("all", "some", "none"),
    # student's and teacher's
    "dtypes": ((F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16)),
    # huge: 0 and ±1e4; masked: -inf at the same ids of both models; close: the models nearly agree
    "kind": ("normal", "strided", "masked", "close", "huge"),
}


def _pairs(case: tuple) -> set[tuple]:
    """The pairs of values that the case tests: what empties it, beside the two, would leave them untested."""
    v, n, _, kd_ratio, labels, _, _ = case
    empties = {0} if v == 1 else set()
    empties |= {1} if n == 0 else set()
    empties |= {3} if kd_ratio == 0.0 else set()
    empties |= {4} if labels == "none" else {1, 4} if (n, labels) == (1, "some") else set()
    return {((i, case[i]), (j, case[j])) for i, j in itertools.combinations(range(len(case)), 2) if empties <= {i, j}}


def _pairwise() -> list[tuple]:
    """Cases such that any two values of different columns meet in at least one; greedy, small ones first."""
    choose = random.Random(0).choice
    columns = list(VALUES.values())
    pairs = [
        ((i, a), (j, b))
        for (i, left), (j, right) in itertools.combinations(enumerate(columns), 2)
        for a, b in itertools.product(left, right)
    ]
    missing = set(pairs)
    cases = []
    for pair in pairs:
        while pair in missing:
            fixed = dict(pair)
            tries = [tuple(fixed.get(k, choose(column)) for k, column in enumerate(columns)) for _ in range(60)]
            best = max(tries, key=lambda case: (len(_pairs(case) & missing), -case[0] * case[1]))
            missing -= _pairs(best)
            cases.append(best)
    return cases


# The full product would be 14400 cases for each of the variants.
GRID = _pairwise()


def masked(v: int) -> slice:
    """The ids that the kind "masked" masks."""
    return slice(v // 3, v // 2)


def make_labels(labels: str, n: int, v: int, kind: str) -> torch.Tensor:
    """``[N]``; a valid one has a probability."""
    out = torch.randint(0, v, (n,))
    if kind == "masked" and v > 1:
        out = out.where((out < masked(v).start) | (out >= masked(v).stop), 0)
    if labels == "none":
        out[:] = -100
    elif labels == "some":
        out[torch.arange(n) % 3 != 1] = -100
    return out


def without_masked(v: int, labels: torch.Tensor, *logits: torch.Tensor) -> list[torch.Tensor]:
    """Logits and labels as if the masked ids did not exist, which is what they mean."""
    gap = masked(v)
    keep = torch.ones(v, dtype=torch.bool)
    keep[gap] = False
    moved = labels.where(labels < gap.start, labels - (gap.stop - gap.start)).where(labels >= 0, -100)
    return [*(z[:, keep] for z in logits), moved]
