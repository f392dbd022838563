"""The operations of calls for which a host waits are counted, with CPU tensors in the place of a GPU's.

What the source reads is in test_host_sync.py. A run with a GPU that counts what waits is in test_trace_cuda.py.
"""

import pytest
import torch

from helpers.grid_checks import make_inputs
from helpers.waits import Waits, as_another_device
from torchtune_kd.kernels import _chunks, _plan, linear_kd_loss, linear_sparse_kd_loss, softmax_kd_loss
from torchtune_kd.kernels._plan import is_capturing


@pytest.fixture
def as_on_a_device(monkeypatch):
    """CPU tensors are taken for a GPU's; the function returned begins or ends the capture of a CUDA graph."""
    as_another_device(monkeypatch)

    def capture(on: bool) -> None:
        monkeypatch.setattr(_plan, "is_capturing", lambda device: on)

    return capture


def run(inputs: dict, **settings) -> tuple[list[str], list[torch.Tensor]]:
    """Operations that wait, in the forward and the backward pass, and the loss and its gradients."""
    with Waits() as waits:
        loss = linear_kd_loss(**inputs, kd_ratio=0.5, backend="triton", chunk_tokens=3, **settings)
        weights = torch.arange(1.0, loss.numel() + 1).view(loss.shape)
        grads = torch.autograd.grad((loss * weights).sum(), [t for t in inputs.values() if t.requires_grad])
    return waits.found, [loss, *grads]


@pytest.mark.parametrize("ignored", [3, 0])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_waits_once_and_never_while_a_graph_is_captured(reduction, trainable, ignored, as_on_a_device):
    inputs = make_inputs(n=8, v=40, ignored=ignored, trainable=trainable)
    _, expected = run(inputs, reduction=reduction)
    as_on_a_device(False)
    outside, found = run(inputs, reduction=reduction)
    assert outside == ["nonzero"] * (2 if trainable and reduction == "none" else 1)
    as_on_a_device(True)
    captured, also = run(inputs, reduction=reduction)
    assert captured == []
    for right, one, two in zip(expected, found, also, strict=True):
        assert torch.allclose(right, one, rtol=1e-5, atol=1e-7)
        assert torch.allclose(right, two, rtol=1e-5, atol=1e-7)


def test_ignored_tokens_are_not_multiplied(as_on_a_device, monkeypatch):
    """Multiply all 8 tokens in a captured graph, though 4 are ignored: their labels are on the device."""
    inputs = make_inputs(n=8, v=40, ignored=2)
    rows, plain = [], _chunks._logits
    monkeypatch.setattr(_chunks, "_logits", lambda hidden, *rest: rows.append(len(hidden)) or plain(hidden, *rest))
    for capturing, expected in ((False, 4), (True, 8)):
        as_on_a_device(capturing)
        rows.clear()
        linear_kd_loss(**inputs, backend="triton")
        assert rows == [expected] * 2  # of both models


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_logits_never_waits(reduction, as_on_a_device):
    as_on_a_device(False)
    student, labels = torch.randn(3, 20, requires_grad=True), torch.tensor([3, -100, 19])
    with Waits() as waits:
        loss = softmax_kd_loss(
            student,
            torch.randn(3, 20),
            labels,
            kd_ratio=0.5,
            reduction=reduction,
            backend="triton",
            return_metrics=True,
        )[0]
        loss.sum().backward()
    assert waits.found == []


def refuse_capture(monkeypatch) -> None:
    """Labels are on the CPU, and a graph is being captured."""
    monkeypatch.setattr(_plan, "is_capturing", lambda device: True)


SENTENCE = r"would replay the labels of this batch for ever because they are on the CPU; move them to"


@pytest.mark.parametrize("ignored", [2, 0])
def test_labels_on_the_cpu_are_not_captured(backend, ignored, monkeypatch):
    inputs = make_inputs(n=4, v=40, ignored=ignored)
    logits = torch.randn(4, 40)
    refuse_capture(monkeypatch)
    with pytest.raises(ValueError, match=SENTENCE):
        linear_kd_loss(**inputs, backend=backend)
    with pytest.raises(ValueError, match=SENTENCE):
        softmax_kd_loss(logits, logits, inputs["labels"], backend=backend)
    softmax_kd_loss(logits, logits, backend="triton")  # there are no labels to replay


def test_the_torch_backend_cannot_be_captured(as_on_a_device):
    as_on_a_device(True)
    with pytest.raises(ValueError, match="backend='torch' has to wait for the number of valid tokens"):
        linear_kd_loss(**make_inputs(n=4, v=40), backend="torch")


def test_no_graph_is_captured_on_a_cpu_and_before_cuda_starts():
    assert not is_capturing(torch.device("cpu"))
    assert not is_capturing(torch.device("cuda")) or torch.cuda.is_initialized()


def test_masks_do_not_wait_for_the_device(monkeypatch, divergence):
    student, teacher = torch.randn(5, 40, requires_grad=True), torch.randn(5, 40)
    labels = torch.tensor([1, -100, 0, 4, -100])

    def run():
        with Waits() as waits:
            loss, _ = softmax_kd_loss(
                student, teacher, labels, divergence=divergence, temperature=2.0, kd_ratio=0.5, return_metrics=True
            )
            loss.backward()
        return waits

    assert {"nonzero", "_local_scalar_dense"} <= set(run().found)  # what a CPU may do
    as_another_device(monkeypatch)
    waits = run()
    assert not waits.found
    assert "masked_fill_" in waits.seen


def test_on_a_device_the_host_waits_for_the_number_of_tokens_alone(backend, monkeypatch):
    """CPU tensors are taken for a device's: no id is looked at, and one that the student does not have is dropped."""
    as_another_device(monkeypatch)
    bias, dropped = torch.randn(9).requires_grad_(), torch.tensor([[0, 5000], [3, -7], [2, 1]])
    hidden, weight, labels = torch.randn(4, 3), torch.randn(9, 3), torch.tensor([0, 8, -100, 3])
    log_probs = torch.log(torch.tensor([[0.5, 0.2], [0.4, 0.1], [0.6, 0.3]]))
    tail, found = torch.log(torch.tensor([0.3, 0.5, 0.1])), []
    for ids in (dropped, torch.tensor([[0, -1], [3, -1], [2, 1]])):
        with Waits() as waits:
            loss, metrics = linear_sparse_kd_loss(
                hidden, weight, ids, log_probs, tail, labels, student_bias=bias, kd_ratio=0.5, divergence="jsd",
                return_metrics=True, backend=backend,
            )  # fmt: skip
            found.append([loss, *metrics.values(), *torch.autograd.grad(loss, bias)])
        assert waits.found == ["nonzero"]
    assert all(map(torch.equal, *found))
