"""Labels in every layout that a tensor may have, against the same labels in a row and the formula in fp64.

Legend: N tokens, V vocabulary, D hidden width, B batch, S sequence.
"""

import pytest
import torch

from helpers import oracle
from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

N, V, D = 6, 20, 4
LABELS = torch.tensor([3, -100, 19, 0, -100, 7])
ALL_VALID = torch.tensor([3, 11, 19, 0, 5, 7])  # where no label is ignored, nothing picks the valid ones into a copy


def every_second(labels):
    memory = torch.full((2 * N,), V - 1)
    memory[::2] = labels
    return memory[::2]


def column(labels):
    """Take a column of ``[B, S, 2]``: the flat view keeps its stride."""
    memory = torch.full((2, N // 2, 2), V - 1)
    memory[..., 0] = labels.view(2, N // 2)
    return memory[..., 0]


def transposed(labels):
    return labels.view(2, N // 2).t().contiguous().t()


def expanded(labels):
    """One label for all tokens, which lies in memory once."""
    return labels[:1].expand(N)


LAYOUTS = pytest.mark.parametrize("layout", [every_second, column, transposed, expanded])


def from_logits(student, teacher, labels, **settings):
    shape = labels.shape
    return softmax_kd_loss(student.view(*shape, V), teacher.view(*shape, V), labels, **settings)


def from_hidden(student, teacher, labels, **settings):
    """With heads that hand the first V hidden states on, so that the logits are those given."""
    shape, head = labels.shape, torch.eye(V)
    return linear_kd_loss(student.view(*shape, V), head, teacher.view(*shape, V), head, labels, **settings)


@LAYOUTS
@pytest.mark.parametrize("labels", [LABELS, ALL_VALID], ids=["some", "all"])
@pytest.mark.parametrize("function", [from_logits, from_hidden])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_layout_of_labels_changes_nothing(function, labels, layout, reduction, backend):
    labels = layout(labels)
    assert not labels.is_contiguous()
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    settings = {"temperature": 2.0, "kd_ratio": 0.5, "reduction": reduction, "backend": backend}

    def run(labels):
        loss = function(student, teacher, labels, **settings)
        weights = torch.arange(1.0, loss.numel() + 1).view(loss.shape)
        return loss.flatten(), *torch.autograd.grad((loss * weights).sum(), student)

    found, expected = run(labels), run(labels.contiguous())
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours, right)
    truth = oracle.tokens(student.double(), teacher.double(), labels.flatten(), "forward_kl", None, 2.0, 0.5)
    if reduction == "mean":
        truth = truth.sum() / (labels != -100).sum()
    assert torch.allclose(found[0].double(), truth, rtol=1e-5, atol=1e-6)
    weights = torch.arange(1.0, truth.numel() + 1).view(truth.shape)
    (grad,) = torch.autograd.grad((truth * weights).sum(), student)
    assert torch.allclose(found[1], grad, rtol=1e-4, atol=1e-6)


@LAYOUTS
@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_nor_does_it_in_a_graph(function, layout, backend):
    torch._dynamo.reset()
    student, teacher, labels = torch.randn(N, V), torch.randn(N, V), layout(ALL_VALID)
    call = lambda *inputs: function(*inputs, kd_ratio=0.5, backend=backend)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(student, teacher, labels), call(student, teacher, labels.contiguous()))
