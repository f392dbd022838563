"""Bytes and operations that a case cannot do without, instructions that our kernel has, and the time they take.

Legend: N tokens, n valid tokens, V vocabulary, D_s and D_t hidden widths of student and teacher.
"""

from typing import NamedTuple

from ._case import Case

ELEMENT = 2  # bytes of bf16: logits, hidden states, heads, gradients

# Reads of both logit tensors. A softmax must see a whole row before it knows one probability of it. Forward, reverse
# and symmetric KL are sums that one pass gathers together with the normalisers; their gradients are then a function
# of each element. The others need normalised p and q for their sum, and their gradient needs that sum first.
_ONE_PASS = ("forward_kl", "reverse_kl", "symmetric_kl")


class Work(NamedTuple):
    """Hold what a case moves and computes at least."""

    bytes: int
    flops: int  # of matrix products


class Rates(NamedTuple):
    """Hold what the device does per second."""

    copy_bytes: float  # bytes read plus bytes written by a large copy
    matrix_flops: float  # bf16 matrix products
    instructions: float | None = None  # of a warp, on a GPU at the clock it reaches


class Bound(NamedTuple):
    """Hold the least time of something, and what takes it."""

    seconds: float
    of: str  # memory, products or instructions


def passes(divergence: str, gradient: bool, metrics: bool = False) -> int:
    """Return how often both logit tensors are read from memory where a row does not fit on chip."""
    if divergence in _ONE_PASS:
        return 1 + (gradient or metrics)
    return 2 + gradient


def work(case: Case) -> Work:
    """Least bytes and operations of one call."""
    return _softmax(case) if case.op == "softmax" else _linear(case)


def _softmax(case: Case) -> Work:
    """Logits of valid tokens are read once per pass, the gradient ``[N, V]`` is written once, zeros included."""
    read = passes(case.divergence, case.gradient, bool(case.metrics)) * 2 * ELEMENT * case.n_valid * case.vocab
    written = ELEMENT * case.tokens * case.vocab if case.gradient else 0
    return Work(read + written, 0)


def _linear(case: Case) -> Work:
    """2·n·V·D for each product, and every input read and every gradient written once.

    Products: student and teacher logits; gradient of the hidden states; gradient of the head if it is trained.
    """
    student, teacher = case.widths
    products = student * (1 + case.gradient + (case.gradient and case.trainable_head)) + teacher
    read = case.n_valid * (student + teacher) + case.vocab * (student + teacher)
    written = (case.tokens * student + case.trainable_head * case.vocab * student) if case.gradient else 0
    return Work(ELEMENT * (read + written), 2 * case.n_valid * case.vocab * products)


def bound(case: Case, rates: Rates) -> Bound:
    """Return the longer of moving the bytes and computing the products."""
    needed = work(case)
    return max(Bound(needed.bytes / rates.copy_bytes, "memory"), Bound(needed.flops / rates.matrix_flops, "products"))


def bound_of(case: Case, rates: Rates, instructions: float | None) -> Bound:
    """Return the longest of those and of issuing so many instructions for each logit of a valid token."""
    least = bound(case, rates)
    if instructions is None or rates.instructions is None:
        return least
    return max(least, Bound(instructions * case.n_valid * case.vocab / 32 / rates.instructions, "instructions"))
