"""The Triton kernels, interpreted, against the formula in fp64 over the grid."""

import pytest
import torch
from grid import GRID, VALUES
from grid_checks import check_hidden, check_logits

from torchtune_kd.kernels import METRICS, Objective, softmax_kd_loss
from torchtune_kd.kernels._block import Plan

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


def test_walking_the_second_pass_backwards_changes_nothing(divergence):
    from torchtune_kd.kernels._triton import rows

    student, teacher, labels = torch.randn(3, 5000), torch.randn(3, 5000), torch.tensor([4999, -100, 0])
    plan = Plan(Objective(divergence, None, 2.0, 0.5), METRICS, 5000, "none", True, True)
    forwards, backwards = torch.full((2, 3, 5000), torch.nan)
    one = rows(student, teacher, labels, plan, forwards)
    other = rows(student, teacher, labels, plan, backwards, backwards=True)
    assert torch.allclose(one.loss, other.loss, rtol=1e-6)
    assert torch.allclose(one.metrics, other.metrics, rtol=1e-5, atol=1e-6)
    assert torch.allclose(forwards, backwards, rtol=1e-5, atol=1e-9)


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
