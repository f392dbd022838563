"""softmax_kd_loss against the fp64 formula, in value and gradient."""

import pytest
import torch

from helpers import oracle
from helpers.grid import GRID, VALUES
from helpers.grid_checks import check_logits, gradient, worst
from helpers.waits import as_another_device
from torchtune_kd.kernels import Objective, _checks, softmax_kd_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(VALUES.keys(), GRID)
def test_value_and_gradient(divergence, beta, v, n, t, kd_ratio, labels, dtypes, kind, device):
    check_logits(divergence, beta, v, n, t, kd_ratio, labels, dtypes, kind)


# The cases with tokens that are ignored, of which masks and indices make different things.
@pytest.mark.parametrize(VALUES.keys(), [case for case in GRID if case[4] != "all"])
def test_value_and_gradient_with_masks_instead_of_indices(
    monkeypatch, divergence, v, n, t, kd_ratio, labels, dtypes, kind
):
    """The way that other devices go."""
    as_another_device(monkeypatch)
    check_logits(divergence, Objective(divergence).beta, v, n, t, kd_ratio, labels, dtypes, kind)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("t", [0.5, 1.0, 8.0])
def test_equal_models_have_no_loss_and_exactly_no_gradient(divergence, beta, t, dtype, backend, device):
    student = (3 * torch.randn(5, 1000)).to(dtype).requires_grad_()
    loss = softmax_kd_loss(student, student.detach().clone(), divergence=divergence, beta=beta, temperature=t)
    (grad,) = gradient(loss, student)
    assert 0 <= loss <= 1e-6
    assert not grad.any()


def test_small_divergence_from_bf16_is_right(divergence, backend, device):
    """A KL of about 0.002; one peer is 36 % off here."""
    n = 64 if backend == "torch" else 8
    teacher = (3 * torch.randn(n, 4096)).bfloat16()
    student = (teacher.float() + 0.06 * torch.randn(n, 4096)).bfloat16().requires_grad_()
    labels = torch.zeros(n, dtype=torch.long)
    beta = Objective(divergence).beta
    truth = oracle.mean(student.double(), teacher.double(), labels, divergence, beta)
    (true_grad,) = gradient(truth, student)
    loss = softmax_kd_loss(student, teacher, divergence=divergence)
    (grad,) = gradient(loss, student)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-3)
    assert (grad.double() - true_grad.double()).norm() <= 0.01 * true_grad.double().norm()
    alone = softmax_kd_loss(student.detach(), teacher, divergence=divergence)
    assert alone.item() == pytest.approx(truth.item(), rel=2e-3)
    if divergence == "forward_kl":
        assert 0.001 < truth < 0.003


def test_small_divergence_in_fp32_keeps_its_digits(divergence, backend, device):
    """KL of about 1e-6: a difference of rounded log-sums would have no digit left."""
    n = 256 if backend == "torch" else 8  # the error of a row is 1e-8, either way
    teacher = 3 * torch.randn(n, 4096)
    student = (teacher + 0.0015 * torch.randn(n, 4096)).requires_grad_()  # without, Triton reads the logits only once
    beta = Objective(divergence).beta
    truth = oracle.mean(student.double(), teacher.double(), torch.zeros(n).long(), divergence, beta)
    assert softmax_kd_loss(student, teacher, divergence=divergence).item() == pytest.approx(truth.item(), rel=0.01)


def test_the_default_dtype_changes_nothing(divergence, backend):
    student, teacher, labels = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40), torch.tensor([1, -100, 7])
    expected = gradient(softmax_kd_loss(student, teacher, labels, divergence=divergence, kd_ratio=0.5), student)[0]
    torch.set_default_dtype(BF16)
    try:
        got = gradient(softmax_kd_loss(student, teacher, labels, divergence=divergence, kd_ratio=0.5), student)[0]
    finally:
        torch.set_default_dtype(F32)
    assert torch.equal(got, expected)


# Both ends, to where fp32 no longer tells them from 0 and 1 and beyond; the formula in fp64 goes no further.
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("from_end", [1e-3, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("near_0", [True, False])
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("divergence_of_two", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_every_beta_is_right(divergence_of_two, spread, near_0, from_end, backend, device):
    beta = from_end if near_0 else 1 - from_end
    n = 6 if backend == "triton" and spread < 30 else 32  # far apart a few rows may all be at the limit
    student, teacher = (spread * torch.randn(2, n, 50)).unbind()
    student.requires_grad_()
    truth = oracle.mean(student.double(), teacher.double(), torch.zeros(len(student)).long(), divergence_of_two, beta)
    (true_grad,) = gradient(truth, student)
    loss = softmax_kd_loss(student, teacher, divergence=divergence_of_two, beta=beta)
    (grad,) = gradient(loss, student)
    # all are at least of the first order in the distance from the end, two of them of the second
    assert loss.item() == pytest.approx(truth.item(), rel=1e-3, abs=1e-6 * from_end)
    assert (grad - true_grad).norm() <= 1e-3 * true_grad.norm() + 1e-6 * from_end


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("beta_of_two", [1e-300, 1e-40, 1 - 1e-16])
@pytest.mark.parametrize("divergence_of_two", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_no_beta_gives_infinity_where_the_mixture_has_all_ids(divergence_of_two, beta_of_two, backend, device):
    student, teacher = (100 * torch.randn(2, 32, 50)).unbind()
    student.requires_grad_()
    loss = softmax_kd_loss(student, teacher, divergence=divergence_of_two, beta=beta_of_two)
    assert 0 <= loss < 1000
    assert gradient(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_of_distant_models_are_as_right_as_those_of_plain_torch(divergence, beta, dtype, backend, device):
    """Where the student is sure of an id that the teacher rules out, terms of h near a constant would cancel."""
    n = 64 if backend == "torch" else 8
    student, teacher = (12 * torch.randn(2, n, 200)).to(dtype).unbind()
    student.requires_grad_()
    labels = torch.zeros(n).long()

    def plain(dtype):
        loss = oracle.mean(student.to(dtype), teacher.to(dtype), labels, divergence, beta)
        return gradient(loss, student)[0].double() if loss.requires_grad else torch.zeros(student.shape, dtype=F64)

    truth, reference = plain(F64), plain(F32)
    (grad,) = gradient(softmax_kd_loss(student, teacher, divergence=divergence, beta=beta), student)
    rounding = {F32: 1e-6, BF16: 8e-3}[dtype]  # Triton, interpreted, cuts bf16 off where a device rounds it
    assert (grad - truth).norm() <= 2 * (reference - truth).norm() + rounding * truth.norm()


def test_gradcheck(divergence, beta):
    student = torch.randn(4, 5, dtype=F64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=F64)
    labels = torch.tensor([1, -100, 0, 4])
    for reduction in ("mean", "sum", "none"):

        def loss(s, reduction=reduction):
            return softmax_kd_loss(
                s, teacher, labels, divergence=divergence, beta=beta, temperature=1.7, kd_ratio=0.6, reduction=reduction
            )

        assert torch.autograd.gradcheck(loss, student)


def test_id_masked_in_the_student_only(divergence, beta, backend, device):
    """+inf where D needs log(p/0); else the limit, which a logit of -1000 reaches in fp64."""
    student, teacher = torch.randn(2, 6, 50)
    student[:, 7] = -torch.inf
    student.requires_grad_()
    labels = torch.full((6,), 3)
    limit, further = (
        oracle.mean(student.double().clamp(min=low), teacher.double(), labels, divergence, beta) for low in (-1e3, -2e3)
    )
    loss = softmax_kd_loss(student, teacher, labels, divergence=divergence, beta=beta)
    (grad,) = gradient(loss, student)
    assert grad.isfinite().all()
    if further > limit + 1:  # forward KL: q - p, which pulls the student onto the id
        assert loss == torch.inf
        assert (grad[:, 7] < 0).all()
    else:
        assert loss.item() == pytest.approx(limit.item(), rel=1e-5, abs=1e-6)
        assert not grad[:, 7].any()


def test_id_masked_in_the_teacher_only(divergence, beta, backend, device):
    student = torch.randn(6, 50, requires_grad=True)
    teacher = torch.randn(6, 50)
    teacher[:, 7] = -torch.inf
    labels = torch.full((6,), 3)
    limit, further = (
        oracle.mean(student.double(), teacher.double().clamp(min=low), labels, divergence, beta) for low in (-1e3, -2e3)
    )
    loss = softmax_kd_loss(student, teacher, labels, divergence=divergence, beta=beta)
    (grad,) = gradient(loss, student)
    if further > limit + 1:  # reverse KL: the student is pushed off the id, by a finite amount
        assert loss == torch.inf
        assert (grad[:, 7] > 0).all()
        assert grad.isfinite().all()
    else:
        assert loss.item() == pytest.approx(limit.item(), rel=1e-5, abs=1e-6)
        limit_grad = gradient(limit, student)[0] if limit.requires_grad else torch.zeros(6, 50)
        assert worst(grad, limit_grad) < 1e-6


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_an_id_the_teacher_forbids_is_pushed_off_harder_than_one_it_finds_unlikely(dtype, backend, device):
    student = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    for unlikely in (-10.0, -1e3, -3e4):
        teacher = torch.tensor([[0.0, unlikely, -torch.inf]], dtype=dtype)
        loss = softmax_kd_loss(student, teacher, divergence="reverse_kl")
        (grad,) = gradient(loss, student)
        assert loss == torch.inf
        assert grad.isfinite().all()
        assert grad[0, 0] < 0 < grad[0, 2]
        assert grad[0, 1] < grad[0, 2] or (unlikely == -3e4 and grad[0, 1] == grad[0, 2])  # rounded


def test_label_without_probability_has_infinite_cross_entropy(backend, device):
    student = torch.randn(2, 9)
    student[0, 4] = -torch.inf
    student.requires_grad_()
    loss = softmax_kd_loss(student, None, torch.tensor([4, 4]), kd_ratio=0.0)
    assert loss == torch.inf
    assert gradient(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("n", [0, 5])
def test_no_valid_token_gives_a_connected_zero(divergence, n, backend, device):
    student = torch.randn(n, 11, requires_grad=True)
    teacher = torch.full((n, 11), torch.nan)  # ignored tokens are not even read
    labels = torch.full((n,), -100)
    loss = softmax_kd_loss(student, teacher, labels, divergence=divergence, kd_ratio=0.5)
    assert loss == 0
    loss.backward()
    assert student.grad.shape == (n, 11)
    assert not student.grad.any()


def test_ignored_rows_do_not_leak_nan(backend, device):
    student, teacher = torch.randn(2, 4, 11)
    student[1] = torch.nan
    student.requires_grad_()
    labels = torch.tensor([1, -100, 2, 3])
    loss = softmax_kd_loss(student, teacher, labels, kd_ratio=0.5)
    (grad,) = gradient(loss, student)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert not grad[1].any()


@pytest.mark.parametrize("model", [0, 1], ids=["student", "teacher"])
def test_nan_logits_are_not_hidden(divergence, model, backend, device):
    logits = torch.randn(2, 4, 11)
    logits[model, 1, 3] = torch.nan
    student, teacher = logits
    assert softmax_kd_loss(student, teacher, divergence=divergence).isnan()
    loss, metrics = softmax_kd_loss(
        student.requires_grad_(), teacher, divergence=divergence, return_metrics=["kl", "acceptance_rate"]
    )
    assert loss.isnan() and metrics["kl"].isnan() and metrics["acceptance_rate"].isnan()


def test_an_id_masked_in_the_student_that_the_teacher_cannot_have_in_fp32(backend, device):
    """Its p is 0 in fp32, so that it adds nothing, though its log-ratio is infinite."""
    student, teacher = torch.randn(2, 1, 11)
    student[:, 7], teacher[:, 7] = -torch.inf, -300.0
    for divergence in ("forward_kl", "symmetric_kl"):
        z = student.clone().requires_grad_()
        loss, metrics = softmax_kd_loss(z, teacher, divergence=divergence, return_metrics=["kl"])
        ids = [*range(7), *range(8, 11)]
        truth = softmax_kd_loss(
            student[:, ids].double(), teacher[:, ids].double(), divergence=divergence, backend="torch"
        )
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
        assert metrics["kl"].isfinite()
        assert gradient(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("masked", ["student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_symmetric_kl_leaves_out_a_part_of_weight_0_even_if_it_is_infinite(beta, masked, backend, device):
    student, teacher = torch.randn(2, 6, 50)
    (student if masked == "student" else teacher)[:, 7] = -torch.inf
    name = "forward_kl" if beta == 1.0 else "reverse_kl"
    results = []
    for divergence, more in (("symmetric_kl", {"beta": beta}), (name, {})):
        z = student.clone().requires_grad_()
        loss = softmax_kd_loss(z, teacher, divergence=divergence, **more)
        results.append((loss.detach(), *gradient(loss, z)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert results[0][0].isfinite() == ((name == "forward_kl") == (masked == "teacher"))


def test_reduction_none_has_the_shape_of_the_labels_and_weighs_rows(backend):
    student = torch.randn(2, 3, 40, requires_grad=True)
    teacher, labels = torch.randn(2, 3, 40), torch.randint(0, 40, (2, 3))
    labels[0, 1] = -100
    weights = torch.rand(2, 3)
    tokens = softmax_kd_loss(student, teacher, labels, reduction="none", kd_ratio=0.4)
    assert tokens.shape == (2, 3)
    assert tokens[0, 1] == 0
    (grad,) = gradient((tokens * weights).sum(), student)
    for b in range(2):
        for s in range(3):
            one = softmax_kd_loss(student[b, s][None], teacher[b, s][None], labels[b, s][None], kd_ratio=0.4)
            assert torch.allclose(gradient(one, student)[0][b, s] * weights[b, s], grad[b, s], atol=1e-7)


def test_temperature_squared_scales_value_and_gradient(divergence, backend, device):
    """One peer scales the printed number only: its gradient is 4 times too small at T = 2."""
    student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    kwargs = {"divergence": divergence, "temperature": 2.0}
    scaled = softmax_kd_loss(student, teacher, **kwargs)
    bare = softmax_kd_loss(student, teacher, scale_by_temperature_squared=False, **kwargs)
    assert torch.allclose(scaled, 4 * bare)
    assert torch.allclose(gradient(scaled, student)[0], 4 * gradient(bare, student)[0])


def test_sequences_cut_from_longer_ones_are_not_copied(backend, device):
    """[B, S, V] that no view flattens, as ``logits[:, :-1]``."""
    student, teacher = torch.randn(2, 3, 6, 50)
    student.requires_grad_()
    labels = torch.randint(0, 50, (3, 5))
    labels[1] = -100
    cut = softmax_kd_loss(student[:, :-1], teacher[:, :-1], labels, kd_ratio=0.5)
    whole = softmax_kd_loss(
        student[:, :-1].reshape(15, 50), teacher[:, :-1].reshape(15, 50), labels.flatten(), kd_ratio=0.5
    )
    assert torch.allclose(cut, whole)
    assert torch.allclose(gradient(cut, student)[0], gradient(whole, student)[0], atol=1e-8)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(40, 48), (48, 40)])
def test_padded_vocabularies_are_cut_and_said_once(divergence, student_vocab, teacher_vocab, caplog, backend):
    _checks._report_cut.cache_clear()
    student = torch.randn(3, student_vocab, requires_grad=True)
    teacher, labels = torch.randn(3, teacher_vocab), torch.randint(0, 40, (3,))
    kwargs = {"divergence": divergence, "kd_ratio": 0.5}
    cut = softmax_kd_loss(student[:, :40], teacher[:, :40], labels, **kwargs)
    for _ in range(2):
        loss = softmax_kd_loss(student, teacher, labels, **kwargs)
    assert torch.equal(loss, cut)
    assert torch.equal(gradient(loss, student)[0], gradient(cut, student)[0])
    assert [record.getMessage() for record in caplog.records] == [
        f"The student scores {student_vocab} ids and the teacher {teacher_vocab}: taken for paddings of one tokenizer, "
        f"both are cut to the first 40 ids."
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_scale_is_a_factor_of_loss_and_gradient_alone(reduction, backend, device):
    logits, teacher = torch.randn(2, 3, 20)
    labels = torch.tensor([3, -100, 19])
    results = []
    for scale, factor in ((1.0, 0.25), (0.25, 1.0)):
        z = logits.clone().requires_grad_()
        settings = {"kd_ratio": 0.5, "reduction": reduction, "scale": scale, "backend": backend}
        loss, metrics = softmax_kd_loss(z, teacher, labels, return_metrics=["kl", "class_loss"], **settings)
        loss = loss * factor
        (grad,) = torch.autograd.grad(loss.sum(), z)
        results.append((loss, grad, metrics["kl"], metrics["class_loss"]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
