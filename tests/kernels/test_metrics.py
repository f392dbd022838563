"""The metrics against their definitions, and what asking for them costs."""

import pytest
import torch
import torch.nn.functional as F

from helpers import oracle
from torchtune_kd.kernels import METRICS, linear_kd_loss, softmax_kd_loss
from torchtune_kd.kernels._torch import block


def expected(student, teacher, labels, kd_loss):
    """Sums over the valid tokens, from the definitions, in fp64."""
    valid = labels != -100
    s, t, y = student.double()[valid], teacher.double()[valid], labels[valid]
    q, p = s.softmax(-1), t.softmax(-1)
    return {
        "class_loss": F.cross_entropy(s, y, reduction="sum"),
        "teacher_class_loss": F.cross_entropy(t, y, reduction="sum"),
        "kd_loss": kd_loss,
        "kl": F.kl_div(q.log(), p, reduction="sum"),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).sum(),
        "student_entropy": torch.distributions.Categorical(q).entropy().sum(),
        "teacher_entropy": torch.distributions.Categorical(p).entropy().sum(),
        "acceptance_rate": torch.minimum(p, q).sum(),
        "num_tokens": valid.sum(),
    }


@pytest.fixture
def tensors(request):
    """Models that agree on about half of the tokens; a third of the tokens is ignored."""
    if "device" in request.fixturenames:
        request.getfixturevalue("device")
    interpreted = "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton"
    n = 6 if interpreted else 30
    student = torch.randn(n, 50, requires_grad=True)
    teacher = student.detach() + torch.randn(n, 50)
    labels = torch.randint(0, 50, (n,))
    labels[::3] = -100
    return student, teacher, labels


# T on both sides of 1 and at 1 (where softmaxes are shared), with either term of the objective and both; with and
# without T².
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("t", "scale"), [(0.5, True), (1.0, True), (4.0, True), (4.0, False)])
def test_values(tensors, divergence, t, scale, kd_ratio, backend, device):
    student, teacher, labels = tensors
    kwargs = {"divergence": divergence, "temperature": t, "scale_by_temperature_squared": scale}
    beta = {"symmetric_kl": 0.5, "jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}.get(divergence)
    kd_loss = oracle.tokens(
        student.double(), teacher.double(), labels, divergence, beta, t, kd_ratio=1.0, scale=scale
    ).sum()
    plain = softmax_kd_loss(student, teacher, labels, kd_ratio=kd_ratio, **kwargs)
    loss, metrics = softmax_kd_loss(student, teacher, labels, kd_ratio=kd_ratio, return_metrics=True, **kwargs)
    assert torch.equal(loss, plain)
    assert list(metrics) == [*METRICS, "num_tokens"]
    for name, value in expected(student, teacher, labels, kd_loss).items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name
        assert metrics[name].dtype == torch.float32
        assert metrics[name].dim() == 0
        assert not metrics[name].requires_grad
    (grad,) = torch.autograd.grad(loss, student)
    (plain_grad,) = torch.autograd.grad(plain, student)
    assert torch.equal(grad, plain_grad)
    by_parts = (1 - kd_ratio) * metrics["class_loss"] + kd_ratio * metrics["kd_loss"]
    assert loss.item() == pytest.approx((by_parts / metrics["num_tokens"]).item(), rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_each_alone_equals_itself_among_all(tensors, name, backend, device):
    student, teacher, labels = tensors
    _, all_of_them = softmax_kd_loss(student, teacher, labels, temperature=3.0, return_metrics=True)
    _, alone = softmax_kd_loss(student, teacher, labels, temperature=3.0, return_metrics=[name])
    assert list(alone) == [name, "num_tokens"]
    assert torch.equal(alone[name], all_of_them[name])


def test_what_is_defined_depends_on_the_inputs(tensors, backend):
    student, teacher, labels = tensors
    _, without_labels = softmax_kd_loss(student, teacher, return_metrics=True)
    assert set(without_labels) == {*METRICS, "num_tokens"} - {"class_loss", "teacher_class_loss"}
    assert without_labels["num_tokens"] == len(tensors[0])
    _, without_teacher = softmax_kd_loss(student, None, labels, kd_ratio=0.0, return_metrics=True)
    assert set(without_teacher) == {"class_loss", "student_entropy", "num_tokens"}
    _, only_count = softmax_kd_loss(student, teacher, labels, return_metrics=["num_tokens"])
    assert only_count == {"num_tokens": (labels != -100).sum().item()}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"return_metrics": ["perplexity"]}, "'perplexity'"),
        ({"return_metrics": ["kl"], "teacher": None, "kd_ratio": 0.0}, "'kl' needs teacher"),
        ({"return_metrics": ["class_loss"], "labels": None}, "'class_loss' needs labels"),
    ],
)
def test_what_cannot_be_computed_is_refused(tensors, kwargs, message):
    student, teacher, labels = tensors
    given = {"teacher": teacher, "labels": labels, **kwargs}
    teacher, labels = given.pop("teacher"), given.pop("labels")
    with pytest.raises(ValueError, match=message):
        softmax_kd_loss(student, teacher, labels, **given)


def test_metrics_with_masked_ids_are_finite(tensors, backend):
    student, teacher, labels = tensors
    student, teacher = student.detach().clone(), teacher.clone()
    student[:, 5] = teacher[:, 5] = -torch.inf
    student[:, 6] = -torch.inf
    _, metrics = softmax_kd_loss(student, teacher, labels.where(labels > 6, 9), return_metrics=True)
    assert metrics.pop("kl") == torch.inf
    assert metrics.pop("kd_loss") == torch.inf
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", [name for name in METRICS if name != "top1_agreement"])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_nan_logits_are_not_hidden(tensors, model, name, backend):
    student, teacher, labels = (x.detach().clone() for x in tensors)
    (student if model == "student" else teacher)[1, 3] = torch.nan
    _, metrics = softmax_kd_loss(student, teacher, labels, return_metrics=[name])
    reads_other_model_alone = name in ("class_loss", "student_entropy", "teacher_class_loss", "teacher_entropy") and (
        (model == "student") == name.startswith("teacher")
    )
    assert metrics[name].isnan() != reads_other_model_alone


# V: ids are searched in runs of sqrt(V): one of one id, whole ones, and a shorter one at the end.
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("v", [1, 7, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "kd_ratio"), [(1.0, 1.0), (3.0, 0.5), (2.0, 0.0)])
def test_of_ties_the_first_id_counts(v, dtype, t, kd_ratio, backend, device):
    """Few distinct values, so that most rows of either model have several largest ids."""
    n = 200 if backend == "torch" else 20
    student, teacher = torch.randint(0, 4, (2, n, v)).to(dtype).unbind()
    student[: n // 5, -1] = 4  # in the last run, alone
    teacher = teacher.where(torch.rand(n, 1) < 0.5, student)
    labels = torch.zeros(n).long()
    _, metrics = softmax_kd_loss(
        student, teacher, labels, temperature=t, kd_ratio=kd_ratio, return_metrics=["top1_agreement"]
    )
    assert metrics["top1_agreement"] == (student.argmax(-1) == teacher.argmax(-1)).sum()


def test_sums_of_parts_add_up(tensors, backend):
    student, teacher, labels = tensors
    _, whole = softmax_kd_loss(student, teacher, labels, return_metrics=True)
    parts = [softmax_kd_loss(*(x[rows] for x in tensors), return_metrics=True)[1] for rows in (slice(7), slice(7, 30))]
    for name, value in whole.items():
        assert (parts[0][name] + parts[1][name]).item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "softmaxes"),
    [
        ({}, 2),  # both models at T = 1
        ({"return_metrics": True}, 2),  # shared with everything
        ({"temperature": 2.0}, 2),  # both at T
        ({"temperature": 2.0, "kd_ratio": 0.5}, 3),  # and the student at 1
        ({"temperature": 2.0, "return_metrics": ["teacher_entropy"]}, 3),
        ({"temperature": 2.0, "return_metrics": True}, 4),
        ({"kd_ratio": 0.0}, 1),
        ({"return_metrics": ["top1_agreement"]}, 2),
        ({"kd_ratio": 0.0, "return_metrics": ["top1_agreement"]}, 2),
        ({"temperature": 2.0, "return_metrics": ["top1_agreement"]}, 2),
    ],
)
def test_only_what_is_asked_for_is_computed(tensors, monkeypatch, kwargs, softmaxes):
    calls = []
    original = block._exponentials
    monkeypatch.setattr(block, "_exponentials", lambda *args: calls.append(args[0]) or original(*args))
    softmax_kd_loss(*tensors, **kwargs)
    assert len(calls) == softmaxes


def test_kd_ratio_1_computes_no_cross_entropy_unless_asked(tensors, monkeypatch):
    calls = []
    original = block._cross_entropy
    monkeypatch.setattr(block, "_cross_entropy", lambda *args: calls.append(args) or original(*args))
    softmax_kd_loss(*tensors, return_metrics=["kl"])
    assert not calls
    softmax_kd_loss(*tensors, return_metrics=["class_loss"])
    assert calls


def test_linear_metrics_need_no_gradient(backend):
    hidden, weight = torch.randn(6, 4), torch.randn(20, 4)
    labels = torch.randint(0, 20, (6,))
    with torch.no_grad():
        loss, metrics = linear_kd_loss(hidden, weight, hidden, weight, labels, return_metrics=True)
    assert loss == 0
    assert metrics["top1_agreement"] == metrics["num_tokens"] == 6
    assert metrics["acceptance_rate"].item() == pytest.approx(6, rel=1e-5)
