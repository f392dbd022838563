"""What holds for any input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtune_kd.kernels import DIVERGENCES, Objective, linear_kd_loss, softmax_kd_loss

BETAS = st.floats(0, 1, width=16)
SEEDS = st.integers(0, 10**6)
NAMES = st.sampled_from(DIVERGENCES)
# e^±6 spans sharp and flat distributions alike
SPREADS = st.floats(0, 6).map(lambda x: 2.0**x)


def draw(seed, n, v, spread, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n, v, generator=generator).mul(spread).to(dtype)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < 0.3] = -100
    return student, teacher, labels


def with_beta(name, beta):
    return {"divergence": name, "beta": None if Objective(name).beta is None else beta}


@settings(max_examples=150, deadline=None)
@given(NAMES, BETAS, SEEDS, st.integers(1, 5), st.integers(1, 40), SPREADS, st.floats(0.25, 8))
def test_never_negative_and_rows_of_the_gradient_sum_to_0(name, beta, seed, n, v, spread, t):
    student, teacher, labels = draw(seed, n, v, spread)
    student.requires_grad_()
    tokens = softmax_kd_loss(student, teacher, labels, temperature=t, reduction="none", **with_beta(name, beta))
    assert (tokens >= 0).all()
    (grad,) = torch.autograd.grad(tokens.sum(), student)
    assert grad.isfinite().all()
    # it is made of terms as large as the loss and as T, which cancel
    assert (grad.sum(-1).abs() <= 1e-6 * (1 + t + tokens)).all()


@settings(max_examples=60, deadline=None)
@given(NAMES, BETAS, SEEDS, st.integers(-50, 50), st.integers(-50, 50))
def test_adding_a_constant_to_logits_changes_nothing(name, beta, seed, student_shift, teacher_shift):
    student, teacher, labels = draw(seed, 4, 17, 2.0, torch.float64)
    kwargs = {"kd_ratio": 0.5, "reduction": "none", **with_beta(name, beta)}
    moved = softmax_kd_loss(student + student_shift, teacher + teacher_shift, labels, **kwargs)
    assert torch.allclose(softmax_kd_loss(student, teacher, labels, **kwargs), moved, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(NAMES, SEEDS, st.integers(0, 4), st.floats(0, 1))
def test_splitting_a_batch_and_adding_the_sums_changes_nothing(name, seed, cut, kd_ratio):
    student, teacher, labels = draw(seed, 5, 17, 2.0, torch.float64)
    student.requires_grad_()
    kwargs = {"divergence": name, "kd_ratio": kd_ratio}
    whole = softmax_kd_loss(student, teacher, labels, **kwargs)
    count = (labels != -100).sum().clamp(min=1)
    parts = [
        softmax_kd_loss(student[rows], teacher[rows], labels[rows], reduction="sum", **kwargs) / count
        for rows in (slice(cut), slice(cut, 5))
    ]
    assert torch.allclose(sum(parts), whole)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (sum(parts), whole)]
    assert torch.allclose(*grads)


@settings(max_examples=60, deadline=None)
@given(NAMES, SEEDS, st.integers(1, 12), st.sampled_from(["mean", "sum", "none"]))
def test_the_chunk_size_changes_nothing(name, seed, chunk_tokens, reduction):
    hidden, teacher_hidden, labels = draw(seed, 9, 6, 1.0, torch.float64)
    labels[labels >= 0] += seed % 5
    weight, teacher_weight, _ = draw(seed + 1, 11, 6, 1.0, torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()

    def run(chunk):
        loss = linear_kd_loss(
            hidden, weight, teacher_hidden, teacher_weight, labels,
            divergence=name, kd_ratio=0.5, reduction=reduction, chunk_tokens=chunk,
        )  # fmt: skip
        return loss, *torch.autograd.grad(loss.sum(), (hidden, weight))

    for ours, whole in zip(run(chunk_tokens), run(None), strict=True):
        assert torch.allclose(ours, whole, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(SEEDS, BETAS)
def test_divergences_are_bounded_where_the_mathematics_bounds_them(seed, beta):
    student, teacher, _ = draw(seed, 3, 9, 30.0)
    assert softmax_kd_loss(student, teacher, divergence="tvd") <= 1 + 1e-6
    assert softmax_kd_loss(student, teacher, divergence="jsd") <= torch.log(torch.tensor(2.0)) + 1e-6
    symmetric = softmax_kd_loss(student, teacher, divergence="symmetric_kl", beta=beta)
    swapped = softmax_kd_loss(teacher, student, divergence="symmetric_kl", beta=1 - beta)
    assert symmetric.item() == pytest.approx(swapped.item(), rel=1e-4, abs=1e-6)
