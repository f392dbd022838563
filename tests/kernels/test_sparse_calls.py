"""Call linear_sparse_kd_loss as it may be and may not be: in graphs, without values, and what it must not hold.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, k stored ids a token.
"""

import dataclasses
import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import cells
from torchtune_kd.kernels import (
    Objective,
    _plan,
    _sparse_checks,
    linear_kd_loss,
    linear_sparse_kd_loss,
    linear_sparse_kd_objective,
    on_meta,
)

BF16, F32 = torch.bfloat16, torch.float32


def call(**changes):
    arguments = {
        "student_hidden": torch.randn(4, 3),
        "student_weight": torch.randn(9, 3),
        "ids": torch.tensor([[0, 8], [3, -1], [2, 1]]),
        "log_probs": torch.log(torch.tensor([[0.5, 0.2], [0.4, 0.1], [0.6, 0.3]])),
        "tail": torch.log(torch.tensor([0.3, 0.5, 0.1])),
        "labels": torch.tensor([0, 8, -100, 3]),
    }
    return linear_sparse_kd_loss(**{**arguments, **changes})


REFUSED = [
    ({"divergence": "foward_kl"}, "did you mean 'forward_kl'"),
    ({"reduction": "avg"}, "reduction must be one of mean, sum, none"),
    ({"backend": "cuda"}, "backend must be one of auto, torch, triton"),
    ({"backend": "triton", "log_probs": torch.zeros(3, 2).double()}, "backend='triton' computes in fp32, but an inp"),
    ({"chunk_tokens": 0}, "chunk_tokens must be a whole number above 0"),
    ({"labels": None}, "needs labels"),
    ({"labels": torch.tensor([0, 9, -100, 3])}, r"\[0, 9\) or equal ignore_index=-100, but one is 9"),
    ({"student_weight": torch.randn(9, 4)}, r"student_weight must be \[V, 3\]"),
    ({"ids": None}, "needs a teacher, but ids is None"),
    ({"log_probs": None}, "needs a teacher, but log_probs is None"),
    ({"ids": [[0, 8]] * 3}, "ids must be a tensor, but got list"),
    ({"ids": torch.zeros(3).long()}, r"ids must be \[n, k\].*but got \[3\]"),
    ({"ids": torch.zeros(3, 0).long()}, r"k at least 1, but got \[3, 0\]"),
    ({"ids": torch.rand(3, 2)}, "ids must be integers, but got torch.float32"),
    ({"ids": torch.tensor([[0, 8], [3, -2], [2, 1]])}, r"ids must lie in \[0, 9\) or be -1 for padding, but one is -2"),
    ({"ids": torch.tensor([[0, 8], [3, 1033], [2, 1]])}, "but one is 1033; distil between models that share a tok"),
    ({"ids": torch.tensor([[0, 8], [3, 3], [2, 1]])}, "ids of one token must differ, but 3 is stored twice"),
    ({"log_probs": torch.zeros(3, 3)}, r"log_probs must be \[3, 2\] to fit ids, but got \[3, 3\]"),
    ({"log_probs": torch.zeros(3, 2).long()}, "log_probs must be a floating-point tensor, but got torch.int64"),
    ({"log_probs": torch.zeros(3, 2, requires_grad=True)}, r"pass log_probs.detach\(\)"),
    ({"tail": torch.zeros(3, 2)}, r"tail must be \[3\] to fit ids, but got \[3, 2\]"),
    ({"tail": -1.0}, "tail must be a tensor, but got float"),
    ({"tail_at_1": torch.zeros(4)}, r"tail_at_1 must be \[3\] to fit ids, but got \[4\]"),
    ({"entropy": torch.zeros(4)}, r"entropy must be \[3\] to fit ids, but got \[4\]"),
    ({"entropy": torch.zeros(3, device="meta")}, "entropy must be on the student's device cpu, but is on meta"),
    ({"labels": torch.tensor([0, 8, 1, 3])}, "ids must have one row for each of the 4 valid tokens, but got 3"),
    ({"tail": None, "divergence": "reverse_kl"}, "reverse_kl is infinite where the teacher has no mass outside"),
    ({"tail": None, "divergence": "symmetric_kl"}, "symmetric_kl is infinite .* pass the tail at temperature 1.0"),
    ({"tail": None, "divergence": "jsd", "beta": 1.0}, "jsd is infinite"),
    (
        {"tail": None, "ids": torch.tensor([[0, 8], [-1, -1], [2, 1]])},
        "must have an id that is stored where tail is No",
    ),
    ({"sampled": True}, "sampled ids have no tail, .* leave tail out"),
    (
        {"sampled": True, "tail": None, "temperature": 2.0},
        "unbiased for forward_kl at temperature 1 alone, but got for",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call(**changes)
    assert "\n" not in str(refusal.value)
    assert call() > 0


def test_what_is_finite_without_a_tail_is_not_refused():
    assert call(tail=None, divergence="symmetric_kl", beta=1.0).isfinite()
    assert call(tail=None, divergence="jsd", beta=0.0).isfinite()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_any_integer_dtype_will_do(dtype):
    torch.manual_seed(0)
    right = call()
    torch.manual_seed(0)
    assert torch.equal(call(ids=torch.tensor([[0, 8], [3, -1], [2, 1]], dtype=dtype)), right)


def test_the_signature_is_as_promised():
    found = inspect.signature(linear_sparse_kd_loss).parameters
    positional = ["student_hidden", "student_weight", "ids", "log_probs", "tail", "labels"]
    assert [name for name, p in found.items() if p.kind is not p.KEYWORD_ONLY] == positional
    shared = {n: p.default for n, p in inspect.signature(linear_kd_loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    own = {"tail_at_1": None, "entropy": None, "sampled": False}
    ours = {name: p.default for name, p in found.items() if p.kind is p.KEYWORD_ONLY}
    assert ours == {n: d for n, d in shared.items() if not n.startswith("teacher_")} | own
    settings = {field.name for field in dataclasses.fields(Objective)}
    entry = [name for name in inspect.signature(linear_sparse_kd_objective).parameters if name != "objective"]
    assert entry == [name for name in found if name not in settings]


def test_neg_inf_in_the_tail_and_in_the_student(backend):
    """A teacher without a rest makes the reverse KL infinite; a student's -inf the forward KL; gradients are finite."""
    for divergence, value in (("forward_kl", False), ("reverse_kl", True), ("jsd", False), ("tvd", False)):
        bias = torch.randn(9).requires_grad_()
        loss = call(tail=torch.full((3,), -torch.inf), divergence=divergence, student_bias=bias, backend=backend)
        assert loss.isinf() == value
        assert torch.autograd.grad(loss, bias)[0].isfinite().all()
    bias = torch.zeros(9)
    bias[4:8] = -torch.inf  # of the rest, and of no label
    assert call(student_bias=bias, kd_ratio=0.5, return_metrics=True, backend=backend)[0].isfinite()
    bias[0] = -torch.inf
    bias.requires_grad_()
    loss = call(student_bias=bias, backend=backend)
    assert loss.isinf()
    assert torch.autograd.grad(loss, bias)[0].isfinite().all()


@pytest.mark.parametrize("where", ["student_bias", "log_probs", "tail"])
def test_nan_is_not_hidden(where, backend):
    tensors = {"student_bias": torch.zeros(9), "log_probs": torch.full((3, 2), -1.0), "tail": torch.full((3,), -1.0)}
    tensors[where].view(-1)[0] = torch.nan
    assert call(**tensors, backend=backend).isnan()


# ------------------------------------------------------------------------------------------------ graphs


def test_a_graph_that_is_captured_is_refused(backend, monkeypatch):
    """Wherever the labels are: it has one row of ids for each valid token, whose number would be fixed."""
    monkeypatch.setattr(_sparse_checks, "is_capturing", lambda device: True)
    with pytest.raises(ValueError, match=r"the number of valid tokens, .* would be fixed; leave it out of the graph"):
        call(backend=backend)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("settings", [{"kd_ratio": 0.5, "return_metrics": True}, {"tail": None, "tail_at_1": None}])
def test_compiled_is_eager_and_one_operator(settings, reduction, backend):
    case, graphs = cells.make(5, dtype=F32), []

    def loss_of(hidden, weight, bias):
        changed = case._replace(hidden=hidden, weight=weight, bias=bias)
        return changed.loss(2.0, F32, reduction=reduction, backend=backend, **settings)

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "_kd" in str(node.target)])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def results(function):
        found = function(*case.trained)
        loss, metrics = found if isinstance(found, tuple) else (found, {})
        return [loss.detach(), *metrics.values(), *torch.autograd.grad(loss.sum(), case.trained)]

    found = results(torch.compile(loss_of, fullgraph=True, backend=look))
    torch.testing.assert_close(found, results(loss_of), rtol=0, atol=0)
    assert [name.rpartition("::")[2] for names in graphs for name in names] == [graphs[0][0].rpartition("::")[2]]


def test_what_a_graph_is_handed_is_checked_when_it_runs():
    compiled = torch.compile(lambda ids: call(ids=ids), fullgraph=True, backend="eager")
    assert compiled(torch.tensor([[0, 8], [3, -1], [2, 1]])).isfinite()
    with pytest.raises(ValueError, match="3 is stored twice"):
        compiled(torch.tensor([[0, 8], [3, 3], [2, 1]]))
    with pytest.raises(ValueError, match="one row for each of the 3 valid tokens, but got 2"):
        call(ids=torch.tensor([[0, 8], [3, 2]]), log_probs=torch.zeros(2, 2), tail=torch.zeros(2))


def test_changed_in_place_before_backward():
    """Reduction "none" with a trained head reads the stored ids again."""
    case = cells.make(4)
    signal = case.signal(1.0)
    loss = linear_sparse_kd_loss(case.hidden, case.weight, labels=case.labels, reduction="none", **signal).sum()
    signal["log_probs"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, case.weight)


# ------------------------------------------------------------------------------------------------ memory


class Recorder(TorchDispatchMode):
    """Notes the shape of every tensor that is allocated, and the sizes of matrix products."""

    def __init__(self):
        self.allocated, self.products = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.products.append((a.shape[0], a.shape[1], b.shape[1]))
        if isinstance(out, torch.Tensor) and not func._schema.is_mutable and not func.is_view:
            self.allocated.append(tuple(out.shape))
        return out


def test_one_chunk_of_logits_and_no_teacher(backend):
    """Half of the tokens are ignored: those are multiplied by nothing, and of a vocabulary's width is one chunk."""
    n, v, d, k, chunk = {"torch": (600, 8192, 16, 8, 128), "triton": (24, 2112, 16, 8, 8)}[backend]
    labels = torch.arange(n) % v
    labels[::2] = -100
    valid = n // 2
    hidden, weight = torch.randn(n, d).requires_grad_(), torch.randn(v, d)
    ids = torch.rand(valid, v).topk(k).indices
    log_probs = torch.rand(valid, k).log() - 3
    with Recorder() as recorder:
        loss, _ = linear_sparse_kd_loss(
            hidden, weight, ids, log_probs, torch.zeros(valid), labels, kd_ratio=0.5, temperature=2.0,
            tail_at_1=torch.zeros(valid), chunk_tokens=chunk, return_metrics=True, backend=backend,
        )  # fmt: skip
        loss.backward()
    wide = [shape for shape in recorder.allocated if len(shape) >= 2 and shape[-1] >= v]
    block = _plan.rows_per_block(v, torch.device("cpu"))
    # the logits, and in PyTorch three buffers of a block of rows: the rest at T and at 1, and scratch for the entropy
    assert wide == [(chunk, v), (3, block, v + 1)][: 2 if backend == "torch" else 1]
    assert sum(rows for rows, inner, columns in recorder.products if columns == v) == valid
    assert sum(rows for rows, inner, columns in recorder.products if inner == v) == valid
    assert len(recorder.products) == 2 * -(-valid // chunk)


def test_on_meta_it_allocates_the_same():
    shapes = {"student_hidden": (300, 16), "student_weight": (4000, 16), "log_probs": (200, 8), "tail": (200,)}
    found = []
    for device in ("cpu", "meta"):
        tensors = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        tensors["student_hidden"].requires_grad_()
        tensors["student_weight"].requires_grad_()
        ids = torch.arange(8).expand(200, 8).to(device)
        labels = torch.arange(300)
        labels[::3] = -100
        with on_meta("cpu"):
            loss = linear_sparse_kd_loss(**tensors, ids=ids, labels=labels, chunk_tokens=128)
            grads = torch.autograd.grad(loss, (tensors["student_hidden"], tensors["student_weight"]))
        found.append([(x.shape, x.dtype) for x in (loss, *grads)])
    assert found[0] == found[1]
