"""softmax_kd_loss against the fp64 formula, in value and gradient."""

import pytest
import torch

from torchtune_kd.kernels import Objective, softmax_kd_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# V: 1 (one id, nothing to learn), 7 (odd, below a vector register), 1000 (no power of two), 4096 (several blocks
# of rows). N: 0, 1, 3, and 129 (one more than a multiple of any block). T: below, at and above 1. Pairwise rather
# than the full product: every two values of different columns that can interact meet once.
GRID = [
    # V, N, T, kd_ratio, labels, student, teacher, logits
    (1, 3, 1.0, 0.3, "all", F32, F32, "normal"),
    (1, 129, 8.0, 1.0, "some", BF16, BF16, "normal"),
    (7, 0, 2.0, 0.3, "all", F32, F32, "normal"),
    (7, 129, 0.5, 1.0, "some", F64, F64, "normal"),
    (7, 1, 8.0, 0.3, "all", F16, F16, "huge"),
    (1000, 129, 1.0, 0.3, "some", BF16, BF16, "strided"),
    (1000, 3, 2.0, 1.0, "all", F32, F32, "masked"),
    (1000, 1, 0.5, 0.3, "all", F32, BF16, "huge"),
    (1000, 129, 8.0, 0.0, "some", F32, F32, "normal"),
    (1000, 3, 1.0, 0.3, "none", F32, F32, "normal"),
    (1000, 129, 2.0, 1.0, "none", BF16, F32, "normal"),
    (4096, 3, 1.0, 1.0, "some", BF16, F32, "close"),
    (4096, 129, 2.0, 0.3, "some", BF16, BF16, "normal"),
    (4096, 3, 0.5, 0.3, "all", F16, F16, "strided"),
    (4096, 1, 8.0, 1.0, "all", F32, F32, "masked"),
    (4096, 0, 1.0, 1.0, "none", BF16, BF16, "normal"),
    (4096, 3, 2.0, 0.3, "some", F64, F32, "huge"),
]


def make_logits(kind, n, v, student_dtype, teacher_dtype):
    """Student and teacher logits ``[N, V]``; see the names in GRID."""
    scale = {"normal": 2.0, "strided": 2.0, "masked": 2.0, "close": 2.0, "huge": 1.0}[kind]
    width = 2 * v if kind == "strided" else v
    student, teacher = torch.randn(2, n, width).mul_(scale)
    if kind == "close":
        teacher = student + 0.05 * torch.randn(n, width)
    if kind == "huge":
        student, teacher = (torch.randint(-1, 2, (n, width)) * 1e4 for _ in range(2))
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    if kind == "strided":
        student, teacher = student[:, ::2], teacher[:, ::2]
    if kind == "masked":  # the same ids in both models
        student[:, v // 3 : v // 2] = teacher[:, v // 3 : v // 2] = -torch.inf
    return student, teacher


def make_labels(kind, n, v):
    labels = torch.randint(0, v, (n,))
    if kind == "none":
        labels[:] = -100
    elif kind == "some":
        labels[torch.arange(n) % 3 != 1] = -100
    return labels


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def worst(a, b):
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@pytest.mark.parametrize(("v", "n", "t", "kd_ratio", "labels", "s_dtype", "t_dtype", "kind"), GRID)
def test_value_and_gradient(oracle, divergence, beta, v, n, t, kd_ratio, labels, s_dtype, t_dtype, kind):
    student, teacher = make_logits(kind, n, v, s_dtype, t_dtype)
    labels = make_labels(labels, n, v)
    if kind == "masked":  # a valid label has a probability
        labels = labels.where((labels < v // 3) | (labels >= v // 2), 0)
        keep = torch.ones(v, dtype=torch.bool)
        keep[v // 3 : v // 2] = False
    student.requires_grad_()

    def plain(dtype):
        """The oracle's formula in `dtype`; an id at -inf in both models is one that does not exist."""
        s, t_ = student.to(dtype), teacher.to(dtype)
        y = labels
        if kind == "masked":
            s, t_ = s[:, keep], t_[:, keep]
            y = labels.where(labels < v // 3, labels - (v // 2 - v // 3)).where(labels >= 0, -100)
        loss = oracle.mean(s, t_, y, divergence, beta, t, kd_ratio)
        if not loss.requires_grad:  # skew_forward_kl at beta 1 does not depend on the student
            return loss, torch.zeros_like(student)
        return loss, gradient(loss, student)[0]

    truth, true_grad = plain(F64)
    reference, reference_grad = plain(F64 if F64 in (s_dtype, t_dtype) else F32)
    loss = softmax_kd_loss(student, teacher, labels, divergence=divergence, beta=beta, temperature=t, kd_ratio=kd_ratio)
    (grad,) = gradient(loss, student)

    assert loss.dtype == reference.dtype
    assert grad.dtype == s_dtype
    assert loss >= 0
    assert worst(loss, truth) <= worst(reference, truth) + 2e-6 * max(1.0, truth.item())
    largest = true_grad.double().abs().max().item() if n else 0.0
    rounding = {F64: 1e-12, F32: 4e-6, F16: 1e-3, BF16: 8e-3}[s_dtype]
    assert worst(grad, true_grad) <= worst(reference_grad, true_grad) + rounding * largest + 1e-9


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("t", [0.5, 1.0, 8.0])
def test_equal_models_have_no_loss_and_exactly_no_gradient(divergence, beta, t, dtype):
    student = (3 * torch.randn(5, 1000)).to(dtype).requires_grad_()
    loss = softmax_kd_loss(student, student.detach().clone(), divergence=divergence, beta=beta, temperature=t)
    (grad,) = gradient(loss, student)
    assert 0 <= loss <= 1e-6
    assert not grad.any()


def test_small_divergence_from_bf16_is_right(divergence, oracle):
    """A KL of about 0.002; one peer is 36 % off here."""
    teacher = (3 * torch.randn(64, 4096)).bfloat16()
    student = (teacher.float() + 0.06 * torch.randn(64, 4096)).bfloat16().requires_grad_()
    labels = torch.zeros(64, dtype=torch.long)
    beta = Objective(divergence).beta
    truth = oracle.mean(student.double(), teacher.double(), labels, divergence, beta)
    (true_grad,) = gradient(truth, student)
    loss = softmax_kd_loss(student, teacher, divergence=divergence)
    (grad,) = gradient(loss, student)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-3)
    assert (grad.double() - true_grad.double()).norm() <= 0.01 * true_grad.double().norm()
    if divergence == "forward_kl":
        assert 0.001 < truth < 0.003


def test_small_divergence_in_fp32_keeps_its_digits(divergence, oracle):
    """KL of about 1e-6: a difference of rounded log-sums would have no digit left."""
    teacher = 3 * torch.randn(16, 4096)
    student = teacher + 0.0015 * torch.randn(16, 4096)
    beta = Objective(divergence).beta
    truth = oracle.mean(student.double(), teacher.double(), torch.zeros(16).long(), divergence, beta)
    assert softmax_kd_loss(student, teacher, divergence=divergence).item() == pytest.approx(truth.item(), rel=0.01)


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


def test_id_masked_in_the_student_only(divergence, beta, oracle):
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


def test_id_masked_in_the_teacher_only(divergence, beta, oracle):
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


def test_label_without_probability_has_infinite_cross_entropy():
    student = torch.randn(2, 9)
    student[0, 4] = -torch.inf
    student.requires_grad_()
    loss = softmax_kd_loss(student, None, torch.tensor([4, 4]), kd_ratio=0.0)
    assert loss == torch.inf
    assert gradient(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("n", [0, 5])
def test_no_valid_token_gives_a_connected_zero(divergence, n):
    student = torch.randn(n, 11, requires_grad=True)
    teacher = torch.full((n, 11), torch.nan)  # ignored tokens are not even read
    labels = torch.full((n,), -100)
    loss = softmax_kd_loss(student, teacher, labels, divergence=divergence, kd_ratio=0.5)
    assert loss == 0
    loss.backward()
    assert student.grad.shape == (n, 11)
    assert not student.grad.any()


def test_ignored_rows_do_not_leak_nan():
    student, teacher = torch.randn(2, 4, 11)
    student[1] = torch.nan
    student.requires_grad_()
    labels = torch.tensor([1, -100, 2, 3])
    loss = softmax_kd_loss(student, teacher, labels, kd_ratio=0.5)
    (grad,) = gradient(loss, student)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert not grad[1].any()


def test_nan_logits_are_not_hidden(divergence):
    student, teacher = torch.randn(2, 4, 11)
    student[1, 3] = torch.nan
    assert softmax_kd_loss(student, teacher, divergence=divergence).isnan()


def test_reduction_none_has_the_shape_of_the_labels_and_weighs_rows():
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


def test_temperature_squared_scales_value_and_gradient(divergence):
    """One peer scales the printed number only: its gradient is 4 times too small at T = 2."""
    student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    kwargs = {"divergence": divergence, "temperature": 2.0}
    scaled = softmax_kd_loss(student, teacher, **kwargs)
    bare = softmax_kd_loss(student, teacher, scale_by_temperature_squared=False, **kwargs)
    assert torch.allclose(scaled, 4 * bare)
    assert torch.allclose(gradient(scaled, student)[0], 4 * gradient(bare, student)[0])


def test_sequences_cut_from_longer_ones_are_not_copied():
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


def test_gradient_survives_a_second_backward_and_an_incoming_scale():
    student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    loss = softmax_kd_loss(student, teacher)
    first = gradient_of(loss, student, 1.0, retain=True)
    doubled = gradient_of(loss, student, 2.0, retain=True)
    last = gradient_of(loss, student, 1.0, retain=False)
    assert torch.equal(first, last)
    assert torch.equal(doubled, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        gradient_of(loss, student, 1.0, retain=False)


def gradient_of(loss, student, scale, retain):
    return torch.autograd.grad(loss, student, torch.tensor(scale), retain_graph=retain)[0].clone()


def test_twice_in_one_graph_and_under_checkpoint():
    student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    once = gradient(softmax_kd_loss(student, teacher), student)[0]
    twice = softmax_kd_loss(student, teacher) + 2 * softmax_kd_loss(student, teacher)
    assert torch.allclose(gradient(twice, student)[0], 3 * once)
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(softmax_kd_loss, student, teacher, use_reentrant=reentrant)
        student.grad = None
        loss.backward()
        assert torch.equal(student.grad, once)


def test_autocast_leaves_the_arithmetic_in_fp32():
    student, teacher = torch.randn(2, 3, 40)
    plain = softmax_kd_loss(student, teacher, divergence="jsd", temperature=3.0)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(softmax_kd_loss(student, teacher, divergence="jsd", temperature=3.0), plain)


def test_second_derivatives_are_refused():
    student = torch.randn(3, 40, requires_grad=True)
    loss = softmax_kd_loss(student, torch.randn(3, 40)) ** 2
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(40, 48), (48, 40)])
def test_padded_vocabularies_are_cut_and_said_once(divergence, student_vocab, teacher_vocab, caplog):
    from torchtune_kd.kernels import _vocab

    _vocab._report_cut.cache_clear()
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
