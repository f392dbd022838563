"""The metrics of stored ids against their definitions, and what ids drawn from a teacher estimate.

Legend: N tokens, n valid tokens, V vocabulary, k stored ids a token.
"""

import pytest
import torch

from helpers import cells
from torchtune_kd.kernels import METRICS, SPARSE_METRICS, linear_kd_loss, linear_sparse_kd_loss

F32, F64 = torch.float32, torch.float64
V = 97


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.5, 0.0])
def test_values(divergence, kd_ratio, t, k):
    case = cells.make(k, n=20)
    case = case._replace(bias=(case.bias + case.teacher.mean(0)).detach().requires_grad_())  # agree now and then
    settings = {"divergence": divergence, "kd_ratio": kd_ratio, "entropy": cells.entropy(case.teacher)}
    loss, found = case.loss(t, return_metrics=True, **settings)
    right = cells.sums_of_metrics(case, cells.truth(case, divergence, t))
    assert list(found) == [*SPARSE_METRICS, "num_tokens"]
    for name, value in right.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert found[name].dtype == F32 and found[name].dim() == 0
    alone = case.loss(t, **settings)
    close = 1e-15 if kd_ratio == 0.0 else 0.0  # there no teacher is read, unless a metric asks for it
    for a, b in zip((loss, *case.gradients(loss)), (alone, *case.gradients(alone)), strict=True):
        assert (a - b).abs().max() <= close * max(1.0, abs(loss.item()))
    for name in SPARSE_METRICS:
        assert torch.equal(case.loss(t, return_metrics=[name], **settings)[1][name], found[name]), name


def test_bounds():
    """Bound the KL and the teacher's loss from below, the acceptance rate from above."""
    case = cells.make(6, n=30)
    whole = torch.zeros(30, V, dtype=F64)
    whole[case.labels != -100] = case.teacher
    student = case.hidden, case.weight
    right = linear_kd_loss(
        *student, whole, torch.eye(V, dtype=F64), case.labels, student_bias=case.bias, return_metrics=True
    )[1]
    found = case.loss(1.0, return_metrics=True)[1]
    assert 0 < found["kl_cells"] < right["kl"]
    assert 0 < found["teacher_class_loss_cells"] < right["teacher_class_loss"]
    assert right["acceptance_rate"] < found["acceptance_rate_cells"] < found["num_tokens"]
    for name in ("class_loss", "student_entropy", "top1_agreement"):
        assert found[name].item() == pytest.approx(right[name].item(), rel=1e-6)
    assert {*METRICS} & {*SPARSE_METRICS} == {
        "class_loss", "kd_loss", "top1_agreement", "student_entropy", "teacher_entropy"
    }  # fmt: skip


TAIL, ENTROPY, TOP = (
    {"kl_cells", "acceptance_rate_cells", "teacher_class_loss_cells"},
    {"teacher_entropy"},
    {"top1_agreement"},
)


@pytest.mark.parametrize(
    ("t", "settings", "undefined"),
    [
        (1.0, {"tail_at_1": None}, ENTROPY),
        (2.0, {"tail_at_1": None}, ENTROPY | TAIL),
        (2.0, {"tail": None}, ENTROPY),  # renormalised at T, and the tail at 1 is known
        (1.0, {"tail": None, "tail_at_1": None}, ENTROPY | TAIL),
        (1.0, {"tail": None, "tail_at_1": None, "sampled": True}, ENTROPY | TAIL | TOP),
    ],
)
def test_what_is_not_defined_is_left_out_and_refused_by_name(t, settings, undefined):
    case = cells.make(5)
    found = case.loss(t, return_metrics=True, **settings)[1]
    assert {*SPARSE_METRICS} - {*found} == undefined
    for name in sorted(undefined):
        with pytest.raises(ValueError, match=f"the metric '{name}' needs .*, which this call does not give"):
            case.loss(t, return_metrics=[name], **settings)
    with pytest.raises(ValueError, match=r"metrics are class_loss, .* but return_metrics names 'kl'"):
        case.loss(t, return_metrics=["kl"], **settings)


def test_of_ties_the_first_id_counts(backend):
    """Few distinct values; padding between the stored ids."""
    teacher, student = torch.randint(0, 3, (2, 200, 20)).float()
    ids = teacher.topk(12).indices[:, torch.randperm(12)]
    ids[:, ::5] = ids[:, ::5].where(torch.rand(200, 3) < 0.5, -1)
    log_probs = (
        teacher.log_softmax(-1).gather(-1, ids.clamp(min=0)).where(ids >= 0, 0.0)
    )  # what padding holds is not read
    tail = torch.zeros(200)
    found = linear_sparse_kd_loss(
        student,
        torch.eye(20),
        ids,
        log_probs,
        tail,
        torch.zeros(200).long(),
        return_metrics=["top1_agreement"],
        backend=backend,
    )[1]
    stored = teacher.where(cells.is_stored(ids, 20), -1.0)
    assert found["top1_agreement"] == (student.argmax(-1) == stored.argmax(-1)).sum()


# ------------------------------------------------------------------------------------------------ drawn ids


def drawn(teacher, count):
    """Draw `count` ids of each row of logits: unique ones ``[n, count]`` padded by -1, and log(times / count)."""
    n, v = teacher.shape
    times = torch.zeros(n, v, dtype=F64)
    times.scatter_add_(
        -1, torch.multinomial(teacher.softmax(-1), count, replacement=True), torch.ones(n, count, dtype=F64)
    )
    most = times.topk(min(count, v))
    return most.indices.where(most.values > 0, -1), (most.values / count).log()


def test_drawn_ids_are_unbiased():
    """Expect of 4000 tokens alike the mean gradient q - p and the mean value KL, within 4 standard errors."""
    n, v, draws = 4000, 20, 8
    teacher, student = torch.randn(2, v, dtype=F64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    ids, log_probs = drawn(teacher.expand(n, v), draws)
    states = student.expand(n, v).clone().requires_grad_()  # the logits, by a head that hands them on
    values = linear_sparse_kd_loss(
        states, torch.eye(v, dtype=F64), ids, log_probs, None, torch.zeros(n).long(), sampled=True, reduction="none",
        entropy=cells.entropy(teacher).expand(n),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(values.sum(), states)
    error = grad.std(0) / n**0.5
    assert ((grad.mean(0) - (q - p)).abs() <= 4 * error).all()
    assert error.max() < 0.005
    kl = (p * (p / q).log()).sum()
    assert (values.mean() - kl).abs() <= 4 * values.std() / n**0.5
    assert values.min() < 0  # it is an estimate


def test_the_formula_of_drawn_ids():
    case = cells.make(8)
    ids, log_probs = drawn(case.teacher, 8)
    h = cells.entropy(case.teacher)
    signal = {"ids": ids, "log_probs": log_probs, "tail": None, "labels": case.labels, "student_bias": case.bias}
    log_q = case.student.log_softmax(-1).gather(-1, ids.clamp(min=0))
    cross_entropy = -(log_probs.exp() * log_q).masked_fill(ids < 0, 0.0).sum(-1)
    for keywords, right in (({}, cross_entropy.mean()), ({"entropy": h}, (cross_entropy - h).mean())):
        loss = linear_sparse_kd_loss(case.hidden, case.weight, **signal, sampled=True, chunk_tokens=3, **keywords)
        assert abs(loss - right) <= 1e-12
        for a, b in zip(case.gradients(loss), torch.autograd.grad(right, case.trained, retain_graph=True), strict=True):
            assert (a - b).abs().max() <= 1e-12
    for keywords in ({"temperature": 2.0}, {"divergence": "jsd"}, {"divergence": "reverse_kl"}):
        with pytest.raises(ValueError, match="sampled ids are unbiased for forward_kl at temperature 1 alone"):
            linear_sparse_kd_loss(case.hidden, case.weight, **signal, sampled=True, **keywords)
