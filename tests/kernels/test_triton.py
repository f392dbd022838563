"""The Triton kernels, interpreted, against the formula in fp64 over the grid."""

import pytest
import torch
from grid import GRID, VALUES
from grid_checks import check_hidden, check_logits

from torchtune_kd.kernels import Objective, linear_kd_loss, softmax_kd_loss

pytest.importorskip("triton")
from torchtune_kd.kernels import _triton_split

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of lanes that are masked out

F64 = torch.float64

# A program is a row, so that more rows are more of the same and a program takes milliseconds here: 129 become 5.
ROWS = {0: 0, 1: 1, 3: 3, 129: 5}
CASES = [(v, ROWS[n], *rest) for v, n, *rest in GRID if F64 not in rest[3]]


@pytest.mark.parametrize(VALUES.keys(), CASES)
def test_value_and_gradient_from_logits(divergence, v, n, t, kd_ratio, labels, dtypes, kind):
    check_logits(divergence, Objective(divergence).beta, v, n, t, kd_ratio, labels, dtypes, kind, "triton")


@pytest.mark.parametrize((*VALUES, "chunk_tokens"), [(*case, (None, 2, 1)[i % 3]) for i, case in enumerate(CASES)])
def test_value_and_gradient_from_hidden_states(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens):
    check_hidden(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens, "triton")


@pytest.mark.parametrize("other", ["triton-backwards", "triton-split"])
def test_other_ways_to_read_less_change_nothing(divergence, other, monkeypatch):
    """Rows walked back in the second pass, rows split over programs and taken few at a time."""
    monkeypatch.setattr(_triton_split, "_CACHE_BYTES", 2**16)  # 4 rows at a time
    student, teacher = torch.randn(2, 5, 5000)
    teacher[3] = student[3]
    labels = torch.tensor([4999, -100, 0, 17, 2500])
    for metrics in (False, True):
        settings = {"divergence": divergence, "temperature": 2.0, "kd_ratio": 0.5, "return_metrics": metrics or ["kl"]}
        losses, sums, grads, values = [], [], [], []
        for backend in ("triton", other):
            z = student.clone().requires_grad_()
            loss, metrics = softmax_kd_loss(z, teacher, labels, **settings, reduction="none", backend=backend)
            losses.append(loss)
            sums.append(torch.stack(list(metrics.values())))
            grads.append(torch.autograd.grad(loss.sum(), z)[0])
            values.append(softmax_kd_loss(student, teacher, labels, divergence=divergence, backend=backend))
        assert torch.allclose(*losses, rtol=1e-6)
        assert torch.allclose(*sums, rtol=1e-5, atol=1e-6)
        assert torch.allclose(*grads, rtol=1e-5, atol=1e-9)
        assert torch.allclose(*values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", ["triton-backwards", "triton-split"])
def test_the_linear_function_takes_them_too(other):
    hidden, head, teacher_hidden, teacher_head = (torch.randn(*shape) for shape in ((3, 4), (50, 4), (3, 6), (50, 6)))
    results = []
    for backend in ("triton", other):
        h = hidden.clone().requires_grad_()
        settings = {"divergence": "jsd", "kd_ratio": 0.5, "backend": backend}
        loss = linear_kd_loss(h, head, teacher_hidden, teacher_head, torch.tensor([3, -100, 49]), **settings)
        results.append((loss, *torch.autograd.grad(loss, h)))
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("v", [49152, 128256, 151936])
def test_vocabularies_of_real_models(divergence, v):
    case = (v, 2, 2.0, 0.3, "all", (torch.bfloat16, torch.bfloat16), "normal")
    check_logits(divergence, Objective(divergence).beta, *case, "triton")


@pytest.mark.parametrize("ruled_out", [slice(0, 2048), slice(5, 6)])
def test_ids_that_the_teacher_rules_out_in_one_of_several_blocks(divergence, ruled_out):
    """A whole block without a finite logit, and maxima that move after an id was ruled out."""
    student, teacher = torch.randn(2, 3, 5000) + torch.arange(5000) / 1000
    teacher[:, ruled_out] = -torch.inf
    losses, grads = [], []
    for backend in ("torch", "triton"):
        z = student.clone().requires_grad_()
        losses.append(softmax_kd_loss(z, teacher, divergence=divergence, backend=backend))
        grads.append(torch.autograd.grad(losses[-1], z)[0])
    assert torch.allclose(*losses)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)
    assert grads[1].sum(-1).abs().max() < 1e-4
