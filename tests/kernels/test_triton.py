"""The Triton kernels, interpreted, against the formula in fp64 over the grid."""

import ast
import inspect
import itertools
from pathlib import Path

import pytest
import torch

from helpers.grid import GRID, VALUES
from helpers.grid_checks import check_hidden, check_logits
from torchtune_kd.kernels import DIVERGENCES, METRICS, Objective, softmax_kd_loss
from torchtune_kd.kernels._plan import Plan

pytest.importorskip("triton")
from torchtune_kd.kernels._triton import row_kernels
from torchtune_kd.kernels._triton.rows import rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of lanes that are masked out

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64

# A program is a row, so that more rows are more of the same and a program takes milliseconds here: 129 become 5.
ROWS = {0: 0, 1: 1, 3: 3, 129: 5}
CASES = [(v, ROWS[n], *rest) for v, n, *rest in GRID if F64 not in rest[3]]


@pytest.mark.parametrize(VALUES.keys(), CASES)
def test_value_and_gradient_from_logits(divergence, v, n, t, kd_ratio, labels, dtypes, kind, device):
    check_logits(divergence, Objective(divergence).beta, v, n, t, kd_ratio, labels, dtypes, kind, "triton")


@pytest.mark.parametrize((*VALUES, "chunk_tokens"), [(*case, (None, 2, 1)[i % 3]) for i, case in enumerate(CASES)])
def test_value_and_gradient_from_hidden_states(
    divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens, device
):
    check_hidden(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens, "triton")


# Every divergence with every vocabulary of real models, and with them all kinds of logits and the ends of T.
LARGE = [
    (name, v, (0.5, 1.0, 2.0, 8.0)[i % 4], ("all", "some")[i % 2], ((BF16, BF16), (F32, BF16))[i % 3 // 2], kind)
    for i, ((name, v), kind) in enumerate(
        zip(
            itertools.product(DIVERGENCES, [49152, 128256, 151936]),
            itertools.cycle(["normal", "masked", "close", "huge", "strided"]),
            strict=False,
        )
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "v", "t", "labels", "dtypes", "kind"), LARGE)
def test_vocabularies_of_real_models(name, v, t, labels, dtypes, kind, backend, device):
    check_logits(name, Objective(name).beta, v, 2, t, 0.3, labels, dtypes, kind, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "v"), [("forward_kl", 128256), ("jsd", 151936), ("reverse_kl", 49152)])
def test_heads_of_real_models(name, v, backend, device):
    check_hidden(name, v, 2, 2.0, 0.3, "some", (BF16, BF16), "normal", 1, backend)


def test_in_place_and_again_give_the_same_bits(divergence, device):
    """The gradient written over the logits, as ``linear_kd_loss`` does it, in several blocks."""
    student, teacher = (3 * torch.randn(2, 2, 2100)).to(BF16)
    labels = torch.tensor([2099, 0])
    plan = Plan(Objective(divergence, temperature=2.0, kd_ratio=0.5), METRICS, 2100, "none", True, True)
    results = []
    for in_place in (False, True, False, True):
        logits = student.clone()
        grad = logits if in_place else torch.full_like(logits, torch.nan)
        results.append((*rows(logits, teacher, labels, plan, grad), grad))
    for found in results[1:]:
        for ours, first in zip(found, results[0], strict=True):
            assert torch.equal(ours, first)


def test_labels_outside_of_the_vocabulary_give_nan(device):
    """As a device sees them, whose labels the host does not look at."""
    student, teacher = torch.randn(2, 6, 20)
    labels = torch.tensor([3, -100, 20, -1, 2**32 + 3, 19])
    plan = Plan(Objective(kd_ratio=0.5), (), 20, "none", True, False)
    loss = rows(student, teacher, labels, plan, None).loss
    assert loss.isnan().tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("ruled_out", [slice(0, 2048), slice(5, 6)])
def test_ids_that_the_teacher_rules_out_in_one_of_several_blocks(divergence, ruled_out, device):
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


def _device_functions():
    """Yield the file and the tree of each function of the kernels."""
    package = inspect.getsourcefile(row_kernels).rpartition("/")[0]
    for file in sorted(Path(package).glob("*.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            decorators = map(ast.unparse, getattr(function, "decorator_list", ()))
            if any(text.startswith("triton.jit") for text in decorators):
                yield file, function


def test_triton_3_6_inlines_every_function():
    """One that returns early, where a value of the run decides, it compiles apart, and fails at tensors in and out."""
    early = []
    for file, function in _device_functions():
        for node in ast.walk(function):
            returns = isinstance(node, ast.If) and any(
                isinstance(inner, ast.Return) and inner.value is not None for inner in ast.walk(node)
            )
            constant = all(
                name.id.isupper() for name in ast.walk(getattr(node, "test", node)) if isinstance(name, ast.Name)
            )
            if returns and not constant:
                early.append(f"{file.name}:{node.lineno} {ast.unparse(node.test)}")
    assert not early


def test_triton_3_2_and_3_3_compile_every_condition():
    """They refuse ``A or B or C``, which later ones and the interpreter take."""
    conditions = 0
    for file, function in _device_functions():
        found = [node for node in ast.walk(function) if isinstance(node, ast.BoolOp)]
        conditions += len(found)
        assert not [f"{file.name}:{node.lineno} {ast.unparse(node)}" for node in found if len(node.values) > 2]
    assert conditions > 10
