"""linear_sparse_kd_loss against the formulas of the cells in fp64.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, k stored ids a token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import cells, oracle
from torchtune_kd.kernels import DIVERGENCES, Objective, linear_kd_loss, linear_sparse_kd_loss
from torchtune_kd.kernels._torch.coarse import coarse, stored_logits, sum_rest

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
V = 97


def largest_error(found, expected):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True))


# One id; a part; all but one, whose rest is one id; all, whose rest is empty.
@pytest.mark.parametrize("k", [1, 64, V - 1, V])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("t", [1.0, 2.0, 0.7])
def test_value_and_gradients(divergence, t, padded, k):
    case = cells.make(k, padded=padded)
    for kd_ratio in (1.0, 0.3):
        loss, right = case.loss(t, divergence=divergence, kd_ratio=kd_ratio), cells.truth(case, divergence, t, kd_ratio)
        assert abs(loss - right) <= 1e-12
        assert largest_error(case.gradients(loss), case.gradients(right)) <= 1e-12


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("name", ["symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_every_beta(name, beta):
    case = cells.make(5, padded=True)
    loss, right = case.loss(2.0, divergence=name, beta=beta), cells.truth(case, name, 2.0, beta=beta)
    assert abs(loss - right) <= 1e-12
    if right.requires_grad and (name, beta) != ("skew_forward_kl", 1.0):
        assert largest_error(case.gradients(loss), case.gradients(right)) <= 1e-12


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_all_ids_are_the_whole_distribution(divergence, t, dtype):
    """With a head of ones and zeros the teacher's logits are its hidden states."""
    case = cells.make(V, dtype=dtype)
    whole = torch.zeros(len(case.labels), V, dtype=F64)
    whole[case.labels != -100] = case.teacher
    keywords = {"divergence": divergence, "temperature": t, "kd_ratio": 0.6}
    right = linear_kd_loss(
        case.hidden, case.weight, whole, torch.eye(V, dtype=F64), case.labels, student_bias=case.bias, **keywords
    )
    loss = case.loss(**{"t": t, **{k: v for k, v in keywords.items() if k != "temperature"}})
    assert loss.dtype == right.dtype == F64
    assert abs(loss - right) <= 1e-12
    bound = {F64: 1e-12, F32: 1e-6, BF16: 4e-3}[dtype]
    assert largest_error(case.gradients(loss), case.gradients(right)) <= bound


@given(
    st.sampled_from(DIVERGENCES),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(1, 20),
    st.integers(0, 10**6),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_cells_are_no_farther_apart_than_all_ids(name, t, k, seed, peaked):
    """The data processing inequality, of which coarsening is the simplest case."""
    torch.manual_seed(seed)
    case = cells.make(k, v=20, scale=8.0 if peaked else 1.0)
    beta = Objective(name).beta
    log_p, log_q = torch.log_softmax(case.teacher / t, -1), torch.log_softmax(case.student.detach() / t, -1)
    whole = oracle.divergence_of(name, beta, log_p, log_q).mean() * t * t
    assert -1e-14 <= case.loss(t, divergence=name).item() <= whole.item() + 1e-12


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_a_tail_of_1e_minus_11_in_fp32(divergence, t, backend):
    """The rest of both models is some 1e-11: 1 - Σ would be 0. D and its gradient by a logit of the rest are right."""
    v, k = 4000, 3
    teacher, student = torch.randn(2, v, dtype=F64)
    teacher[:k] += torch.tensor([34.0, 33.0, 32.0]) * t
    student[:k] += torch.tensor([33.5, 33.0, 31.0]) * t
    student = student.float()
    ids, weight = torch.arange(k).view(1, k), student.unsqueeze(-1)
    case = cells.Case(torch.ones(1, 1).requires_grad_(), weight, torch.zeros(v), teacher[None], torch.tensor([0]), ids)
    q_rest, p_rest = (cells.log_cells(z, ids, t)[0, -1].exp() for z in (student.double()[None], case.teacher))
    assert 1e-12 < q_rest < 1e-10 and 1e-12 < p_rest < 1e-10

    def by_logits(dtype):
        """Gradient by the logits, which is that by a bias, in the dtype of a loss that has one."""
        bias = torch.zeros(v, dtype=dtype).requires_grad_()
        factors = (x.detach().to(dtype) for x in (case.hidden, case.weight))
        return case._replace(**dict(zip(("hidden", "weight", "bias"), (*factors, bias), strict=True)))

    exact, rounded = by_logits(F64), by_logits(F32)
    signal = {name: x.float() if x.is_floating_point() else x for name, x in case.signal(t).items()}
    loss = linear_sparse_kd_loss(
        rounded.hidden, rounded.weight, labels=case.labels, student_bias=rounded.bias, divergence=divergence,
        temperature=t, backend=backend, **signal,
    )  # fmt: skip
    assert loss.dtype == F32
    right = cells.truth(exact, divergence, t)
    assert loss.item() == pytest.approx(right.item(), rel=2e-6)
    (found,), (expected,) = rounded.gradients(loss), exact.gradients(right)
    rest = expected[k:]
    # what fp32 makes of the stored log-probabilities, of size 1, and of a tail of -25 weighs more than its arithmetic
    assert (found[k:] - rest).abs().max() <= 4e-6 * rest.abs().max()
    assert rest.abs().max() < 1e-9


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_mass_of_a_small_rest_in_fp32(t):
    """Q_R itself, within 1e-6 of it."""
    logits, ids, masses = cells.small_rests()
    logits, right = logits.float(), masses[t]
    rest = sum_rest(logits, ids, t, torch.empty(25, 4001), None)
    found = coarse(stored_logits(logits, ids, F32), rest, t).cells.prob[:, -1]
    assert ((found - right) / right).abs().max() <= 1e-6


def test_a_rest_that_underflows_keeps_its_direction(backend):
    """A student that gives the rest e^-200: the forward KL's gradient on it is -P_R, spread as its own softmax."""
    logits, ids = torch.randn(1, 40), torch.tensor([[3, 5]])
    logits[0, [3, 5]] += 200.0
    bias = logits[0].clone().requires_grad_()
    log_probs, tail = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log()
    loss = linear_sparse_kd_loss(
        torch.zeros(1, 2), torch.zeros(40, 2), ids, log_probs, tail, torch.tensor([0]), student_bias=bias,
        backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, bias)
    inside = logits[0].double().clone()
    inside[[3, 5]] = -torch.inf
    expected = -0.25 * inside.softmax(-1)
    expected[[3, 5]] = logits[0, [3, 5]].double().softmax(-1) - torch.tensor([0.5, 0.25], dtype=F64)
    assert (grad - expected).abs().max() <= 1e-6
    assert loss.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(divergence, reduction):
    case = cells.make(3, n=5, v=8, d=3, padded=True)

    def loss(hidden, weight, bias):
        changed = case._replace(hidden=hidden, weight=weight, bias=bias)
        return changed.loss(1.7, divergence=divergence, kd_ratio=0.6, reduction=reduction, chunk_tokens=2)

    assert torch.autograd.gradcheck(loss, case.trained)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_chunks_change_nothing(reduction, dtype):
    case = cells.make(6, n=23, padded=True, dtype=dtype)
    weights = torch.arange(1.0, 24.0) if reduction == "none" else torch.tensor(1.0)
    found = []
    for chunk_tokens in (None, 1, 4, 100):
        loss = case.loss(2.0, kd_ratio=0.5, reduction=reduction, chunk_tokens=chunk_tokens)
        found.append((loss, *case.gradients((loss * weights).sum())))
    for other in found[1:]:
        assert largest_error(other, found[0]) <= {F64: 1e-12, F32: 1e-6}[dtype] * 100


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_low_precision(divergence, dtype):
    """Against plain PyTorch in fp32 from the logits as the model rounds them."""
    case = cells.make(16, n=60, v=500, d=32, dtype=dtype)
    signal = case.signal(2.0, F32)
    student = {"student_hidden": case.hidden, "student_weight": case.weight, "student_bias": case.bias}
    loss = linear_sparse_kd_loss(
        **student, **signal, labels=case.labels, temperature=2.0, divergence=divergence, kd_ratio=0.5
    )
    right = cells.truth(
        case._replace(hidden=case.hidden.double(), weight=case.weight.double(), bias=case.bias.double()),
        divergence,
        2.0,
        0.5,
    )
    assert loss.dtype == F32
    unit = {F32: 2e-6, F16: 2e-3, BF16: 1.5e-2}[dtype]
    assert loss.item() == pytest.approx(right.item(), rel=unit)
    for ours, expected in zip(case.gradients(loss), case.gradients(right), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - expected.double()).norm() <= 2 * unit * expected.double().norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 4])
def test_no_valid_token_gives_a_connected_zero(n, reduction):
    case = cells.make(3, n=n)._replace(
        labels=torch.full((n,), -100), ids=torch.empty(0, 3).long(), teacher=torch.empty(0, V)
    )
    loss = case.loss(2.0, kd_ratio=0.5, reduction=reduction)
    assert not loss.any()
    for grad in case.gradients(loss.sum()):
        assert not grad.any() and grad.isfinite().all()


def test_batch_and_sequence_and_a_frozen_head():
    case = cells.make(4, n=12)
    frozen = case._replace(weight=case.weight.detach(), bias=case.bias.detach())
    flat = frozen.loss(2.0, reduction="none")
    shaped = frozen._replace(hidden=case.hidden.view(3, 4, -1), labels=case.labels.view(3, 4))
    loss = shaped.loss(2.0, reduction="none")
    assert torch.equal(loss, flat.view(3, 4))
    (grad,) = torch.autograd.grad(loss.sum(), case.hidden)
    assert torch.equal(grad, torch.autograd.grad(case.loss(2.0, reduction="none").sum(), case.hidden)[0])


def test_without_a_teacher_it_is_the_cross_entropy():
    case = cells.make(4)
    right = linear_kd_loss(case.hidden, case.weight, None, None, case.labels, student_bias=case.bias, kd_ratio=0.0)
    loss = linear_sparse_kd_loss(
        case.hidden, case.weight, None, None, None, case.labels, student_bias=case.bias, kd_ratio=0.0
    )
    assert torch.equal(loss, right)
    assert largest_error(case.gradients(loss), case.gradients(right)) == 0


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_ids_of_the_teachers_padding_are_cut_off(divergence, t):
    """A teacher with 5 ids more: as where both are cut to the shared prefix, in the part and in the whole."""
    case = cells.make(V)
    wide = torch.cat([case.teacher, torch.randn(len(case.teacher), 5, dtype=F64)], -1)
    # all are stored, those that the student does not have too, and the tail is none
    stored = case._replace(teacher=wide, ids=wide.topk(V + 5).indices).signal(t)
    padded = linear_sparse_kd_loss(
        case.hidden, case.weight, **stored, labels=case.labels, student_bias=case.bias, temperature=t,
        divergence=divergence,
    )  # fmt: skip
    assert abs(padded - case.loss(t, divergence=divergence)) <= 1e-12
    # all of the student's are stored, and the tail is of ids that it does not have
    left = case._replace(teacher=wide, ids=case.ids).signal(t)
    cut = linear_sparse_kd_loss(
        case.hidden, case.weight, **left, labels=case.labels, student_bias=case.bias, temperature=t,
        divergence=divergence,
    )  # fmt: skip
    assert abs(cut - case.loss(t, divergence=divergence)) <= 1e-12


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
def test_without_a_tail_the_stored_ids_are_renormalised(name):
    case, t = cells.make(6, padded=True), 2.0
    log_p = cells.log_cells(case.teacher, case.ids, t)
    log_p[:, -1] = -torch.inf
    log_p = log_p.log_softmax(-1)
    log_q = cells.log_cells(case.student, case.ids, t)
    finite = log_p.clamp(min=-600.0)  # 0·(-inf) is 0 here: e^-600 is nothing, and a number
    right = cells.divergence(name, Objective(name).beta, finite, log_q.clamp(min=-600.0)).mean() * t * t
    loss = case.loss(t, tail=None, tail_at_1=None, divergence=name)
    assert abs(loss - right) <= 1e-12
    assert largest_error(case.gradients(loss), case.gradients(right)) <= 1e-12
