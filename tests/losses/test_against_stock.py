"""torchtune's own losses: where ours agree with them, and where theirs are wrong."""

import inspect

import pytest
import torch
from torchtune.modules import loss as stock

from helpers import oracle
from torchtune_kd import losses

PAIRS = ["ForwardKL", "ReverseKL", "SymmetricKL"]


def make_logits(n=24, vocab=50):
    student, teacher = 2 * torch.randn(2, n, vocab)
    labels = torch.randint(0, vocab, (n,))
    labels[::3] = -100
    return student.requires_grad_(), teacher, labels


def grad_of(loss, student):
    return torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_equal_at_temperature_1(name, normalize):
    student, teacher, labels = make_logits()
    ours = getattr(losses, f"{name}Loss")()(student, teacher, labels, normalize)
    theirs = getattr(stock, f"{name}Loss")()(student, teacher, labels, normalize)
    assert torch.allclose(grad_of(ours, student), grad_of(theirs, student), atol=1e-6)


@pytest.mark.parametrize("seq", [24, 13])
@pytest.mark.parametrize("name", PAIRS)
def test_chunked_gradients_are_equal_at_temperature_1(name, seq):
    student, teacher, labels = make_logits(n=2 * seq)
    student, teacher = student.detach().view(2, seq, 50).requires_grad_(), teacher.view(2, seq, 50)
    labels = labels.view(2, seq)
    pieces = student.chunk(8, 1), teacher.chunk(8, 1)
    ours = getattr(losses, f"{name}WithChunkedOutputLoss")()(*pieces, labels)
    theirs = getattr(stock, f"{name}WithChunkedOutputLoss")()(*pieces, labels)
    assert torch.allclose(grad_of(ours, student), grad_of(theirs, student), atol=1e-7)


def test_stock_forward_kl_is_a_cross_entropy_larger_by_the_teachers_entropy():
    student, teacher, labels = make_logits()
    valid = labels != -100
    entropy = torch.distributions.Categorical(logits=teacher[valid]).entropy().mean()
    ours, theirs = (module.ForwardKLLoss()(student, teacher, labels) for module in (losses, stock))
    assert torch.allclose(theirs, ours + entropy)
    symmetric, stock_symmetric = (
        module.SymmetricKLLoss(sym_kd_ratio=0.3)(student, teacher, labels) for module in (losses, stock)
    )
    assert torch.allclose(stock_symmetric, symmetric + 0.3 * entropy)
    reverse, stock_reverse = (module.ReverseKLLoss()(student, teacher, labels) for module in (losses, stock))
    assert torch.allclose(stock_reverse, reverse)


@pytest.mark.parametrize("name", ["ReverseKL", "SymmetricKL"])
def test_an_ignored_batch_is_nan_there_and_0_here(name):
    student, teacher, labels = make_logits()
    labels = torch.full_like(labels, -100).view(2, 12)
    pieces = student.view(2, 12, 50).chunk(8, 1), teacher.view(2, 12, 50).chunk(8, 1)
    chunked = f"{name}WithChunkedOutputLoss"
    assert getattr(stock, chunked)()(*pieces, labels).isnan()
    ours = getattr(losses, chunked)()(*pieces, labels)
    assert ours == 0
    assert not grad_of(ours, student).any()


def test_an_ignored_batch_is_cut_off_the_graph_there_and_connected_here():
    student, teacher, labels = make_logits()
    labels[:] = -100
    assert not stock.ForwardKLLoss()(student, teacher, labels).requires_grad
    assert losses.ForwardKLLoss()(student, teacher, labels).requires_grad


def test_padded_vocabularies_crash_there_and_are_cut_here():
    student, teacher, labels = make_logits()
    wider = torch.cat([teacher, torch.randn(24, 8)], dim=-1)
    with pytest.raises(RuntimeError):
        stock.ForwardKLLoss()(student, wider, labels)
    ours = losses.ForwardKLLoss()
    assert torch.equal(ours(student, wider, labels), ours(student, teacher, labels))


def test_an_id_masked_in_the_student_alone_is_free_there_and_infinite_here():
    student, teacher, labels = make_logits()
    student = student.detach()
    student[:, 3] = -torch.inf
    student.requires_grad_()
    assert stock.ForwardKLLoss()(student, teacher, labels).isfinite()
    loss = losses.ForwardKLLoss()(student, teacher, labels)
    assert loss == torch.inf
    assert grad_of(loss, student).isfinite().all()


def test_an_id_masked_in_both_models_is_no_nan():
    student, teacher, labels = make_logits()
    student, teacher = student.detach(), teacher.clone()
    student[:, 3] = teacher[:, 3] = -torch.inf
    student.requires_grad_()
    rest = [id_ for id_ in range(50) if id_ != 3]
    for name in losses.__all__:
        if name.endswith("ChunkedOutputLoss") or name == "KDLoss":
            continue
        loss = getattr(losses, name)()
        value = loss(student, teacher, labels)
        assert torch.allclose(value, loss(student[:, rest], teacher[:, rest], labels.clamp(max=48)))
        assert grad_of(value, student).isfinite().all()


def test_gradients_of_bf16_logits_are_as_right_as_the_stock_ones():
    student, teacher, labels = make_logits(vocab=2000)
    student, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    right = grad_of(oracle.mean(student.double(), teacher.double(), labels, "forward_kl"), student)
    error, stock_error = (
        (grad_of(module.ForwardKLLoss()(student, teacher, labels), student) - right).float().norm()
        for module in (losses, stock)
    )
    assert error <= 1.5 * stock_error + 4e-3 * right.float().norm()


@pytest.mark.parametrize("name", [name for name in dir(stock) if name.endswith("Loss") and "KL" in name])
def test_positional_arguments_mean_what_they_mean_in_torchtune(name):
    """`ForwardKLLoss(-100)` and `...WithChunkedOutputLoss(8, -100)` stand in code that was written for torchtune."""
    values = {"num_output_chunks": 4, "sym_kd_ratio": 0.3, "ignore_index": -7}
    given = {key: values[key] for key in inspect.signature(getattr(stock, name)).parameters}
    for module in (stock, losses):
        loss = getattr(module, name)(*given.values())
        assert {key: getattr(loss, key) for key in given} == given
