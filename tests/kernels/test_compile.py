"""Both functions inside graphs: registered operators, ``torch.compile``, ``torch.export``, checkpointing, scaling.

Legend: N tokens, V vocabulary, D hidden width. Sizes are tiny: the interpreter takes 10 to 30 ms for a row.
"""

import itertools

import pytest
import torch
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from torchtune_kd.kernels import METRICS, Objective, _plan, linear_kd_loss, softmax_kd_loss
from torchtune_kd.kernels._linear import NeededGradients
from torchtune_kd.kernels._operators import NAMESPACE
from torchtune_kd.kernels._packing import pack, pack_needed, unpack, unpack_needed
from torchtune_kd.kernels._plan import Plan

BF16, F32 = torch.bfloat16, torch.float32
OPS = getattr(torch.ops, NAMESPACE)
N, V, D = 3, 40, 8


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


def labels(n: int = N) -> torch.Tensor:
    """The second of every three is ignored."""
    out = torch.arange(n) * 7 % V
    out[1::3] = -100
    return out


def from_logits(n: int = N, dtype: torch.dtype = F32) -> tuple:
    """Student and teacher logits, labels."""
    return torch.randn(n, V).to(dtype).requires_grad_(), torch.randn(n, V).to(dtype), labels(n)


def from_hidden(n: int = N, dtype: torch.dtype = F32, trainable: bool = True) -> tuple:
    """Hidden states and heads of student and teacher, labels, bias."""
    shapes = (n, D), (V, D), (n, D + 4), (V, D + 4), (V,)
    *tensors, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    tensors[0].requires_grad_()
    if trainable:
        tensors[1].requires_grad_()
        bias.requires_grad_()
    return *tensors, labels(n), bias


def linear(hidden, weight, teacher_hidden, teacher_weight, labels, bias, **settings):
    return linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, labels, student_bias=bias, **settings)


MAKERS = {softmax_kd_loss: from_logits, linear: from_hidden}
BOTH = pytest.mark.parametrize("function", list(MAKERS), ids=["softmax", "linear"])


def results(call, inputs: tuple) -> list[torch.Tensor]:
    """Loss, metrics and gradients."""
    found = call(*inputs)
    loss, metrics = found if isinstance(found, tuple) else (found, {})
    weights = torch.arange(1.0, loss.numel() + 1).view(loss.shape)
    leaves = [t for t in inputs if t.requires_grad]
    return [loss.detach(), *metrics.values(), *torch.autograd.grad((loss * weights).sum(), leaves)]


def compiled(call, backend: object = "aot_eager", **options: object):
    return torch.compile(call, fullgraph=True, backend=backend, **options)


# ---------------------------------------------------------------------------------------------- operators

REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def plan(reduction: str) -> str:
    """A plan with everything in it, as the operators take it."""
    return pack(Plan(Objective("jsd", 0.5, 2.0, 0.5), ("kl", "kd_loss"), V, reduction, True, True))


@REDUCTION
def test_opcheck_softmax(backend, reduction):
    student, teacher, y = from_logits(dtype=BF16)
    on_graph = student[:0].flatten()
    torch.library.opcheck(OPS.softmax_kd.default, (student, teacher, y, plan(reduction), backend, on_graph))
    only_ce = pack(Plan(Objective(kd_ratio=0.0), (), V, reduction, False, False))
    torch.library.opcheck(OPS.softmax_kd.default, (student.detach(), None, y, only_ce, backend, None))
    grad_loss = torch.randn(N if reduction == "none" else ())
    arguments = (teacher, grad_loss, torch.tensor(2), reduction, backend, False)
    torch.library.opcheck(OPS.softmax_kd_backward.default, arguments)


@REDUCTION
@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_opcheck_linear(trainable, chunk_tokens, backend, reduction):
    *heads, y, bias = from_hidden(dtype=BF16, trainable=trainable)
    needed = pack_needed(NeededGradients(True, trainable, trainable))
    hidden, weight, *teacher = heads
    inputs = hidden, weight, bias, teacher, "++--", y
    arguments = (*inputs, plan(reduction), needed, chunk_tokens, backend, hidden[:0].flatten())
    torch.library.opcheck(OPS.linear_kd.default, arguments)


@pytest.mark.parametrize("grad_loss", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_linear_backward(needed, dtype, grad_loss, backend):
    shapes = (N, D), (V, D), (V,)
    dtypes = dtype, F32, F32  # the sums over chunks are not rounded yet
    grads = [torch.randn(s if used else 0, dtype=d) for s, used, d in zip(shapes, needed, dtypes, strict=True)]
    names = pack_needed(NeededGradients(*needed))
    arguments = (*grads, torch.tensor(grad_loss), torch.tensor(2), "mean", names, dtype, dtype, backend, False)
    torch.library.opcheck(OPS.linear_kd_backward.default, arguments)


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (True, False, True)])
def test_opcheck_linear_recomputed(needed, backend):
    *heads, y, bias = (tensor.detach() for tensor in from_hidden(dtype=BF16))
    hidden, weight, *teacher = heads
    names = pack_needed(NeededGradients(*needed))
    inputs = hidden, weight, bias, teacher, "++--", y
    arguments = (*inputs, torch.randn(N), plan("none"), names, 2, backend, False)
    torch.library.opcheck(OPS.linear_kd_recomputed.default, arguments)


def test_no_operator_is_left_out():
    tested = {"softmax_kd", "softmax_kd_backward", "linear_kd", "linear_kd_backward", "linear_kd_recomputed"}
    tested |= {"float8_weight"}  # in test_float8_loss.py
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")}
    assert names == {f"{NAMESPACE}::{name}" for name in tested}


@pytest.mark.parametrize("metrics", [(), ("kl",), METRICS])
@pytest.mark.parametrize("flag", [True, False])
def test_a_plan_comes_back_from_its_text(divergence, metrics, flag):
    """All but the vocabulary, which the operators' tensors tell; floats to the last bit."""
    beta = None if Objective(divergence).beta is None else 1e-300
    objective = Objective(divergence, beta, 1 / 3, 0.1, -1, flag)
    for reduction in ("mean", "sum", "none"):
        for kind, shares in (("head", ()), ("cells", ()), ("sampled", ()), ("logits", (1 / 3, 2 / 3))):
            whole = Plan(objective, metrics, V, reduction, flag, not flag, 1.0, kind, shares)
            assert unpack(pack(whole))._replace(vocab=V) == whole


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)))
def test_so_do_the_gradients_that_are_needed(needed):
    needed = NeededGradients(*needed)
    assert unpack_needed(pack_needed(needed)) == needed


def test_a_graph_shows_the_plan():
    graphs = Graphs()
    compiled(lambda *x: softmax_kd_loss(*x, divergence="jsd", temperature=2.0, kd_ratio=0.5), graphs)(*from_logits())
    (node,) = (node for node in graphs[0].graph.nodes if "softmax_kd" in str(node.target))
    assert node.args[3] == "'jsd', 0.5, 2.0, 0.5, -100, True, '', 'mean', True, True, 1.0, 'head', ''"


# ------------------------------------------------------------------------------------------ torch.compile

CASES = [
    {"divergence": "forward_kl", "temperature": 2.0, "kd_ratio": 0.5},
    {"divergence": "jsd", "beta": 0.3, "kd_ratio": 0.5, "reduction": "none", "return_metrics": True},
    {"divergence": "skew_reverse_kl", "reduction": "sum", "return_metrics": ["kl", "top1_agreement"]},
    {"divergence": "tvd", "temperature": 0.5, "ignore_index": 7, "scale_by_temperature_squared": False},
    {"kd_ratio": 0.0},
]


@BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.get("divergence", "cross_entropy"))
def test_compiled_is_eager(case, backend, function):
    inputs = MAKERS[function]()

    def call(*inputs):
        y = inputs[2] if function is softmax_kd_loss else inputs[4]
        masked = tuple(t.where(t >= 0, case.get("ignore_index", -100)) if t is y else t for t in inputs)
        return function(*masked, backend=backend, **case)

    same(call, inputs)


class Graphs(list):
    """A backend of ``torch.compile`` that keeps the graphs it was given."""

    def __call__(self, graph, example):
        self.append(graph)
        return lookup_backend("aot_eager")(graph, example)


def same(call, inputs: tuple, backend: object = "aot_eager") -> None:
    """Compiled and eager results agree to the bit."""
    torch.testing.assert_close(results(compiled(call, backend), inputs), results(call, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_with_a_frozen_head(reduction, backend):
    graphs = Graphs()
    call = lambda *inputs: linear(*inputs, kd_ratio=0.5, reduction=reduction, backend=backend)  # noqa: E731
    same(call, from_hidden(trainable=False), graphs)
    (node,) = (node for graph in graphs for node in graph.graph.nodes if "linear_kd" in str(node.target))
    assert node.args[7] == "hidden"  # the head's gradient is not asked for


@pytest.mark.parametrize("function", [softmax_kd_loss, linear], ids=["softmax", "linear"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_new_number_of_tokens_does_not_recompile(function, dtype):
    graphs = Graphs()

    def call(*inputs):
        return function(*inputs, kd_ratio=0.5, return_metrics=True)

    run = compiled(call, graphs)
    for n in (3, 5, 4, 6, 21, 300):  # the first is compiled for its size, the second for any
        inputs = MAKERS[function](n, dtype)
        torch.testing.assert_close(results(run, inputs), results(call, inputs), rtol=0, atol=0)
    assert len(graphs) == 2


@BOTH
def test_a_temperature_may_be_an_input_of_the_graph(function):
    inputs, run = MAKERS[function](), compiled(lambda *x: function(*x[:-1], temperature=x[-1], kd_ratio=0.5))
    for temperature in (1.0, 2.0, 1 / 3):
        loss = function(*inputs, temperature=temperature, kd_ratio=0.5)
        torch.testing.assert_close(run(*inputs, temperature), loss, rtol=0, atol=0)


def test_only_the_second_chunk_recompiles(monkeypatch):
    """A head's gradient in bf16 is summed in fp32 where there are two chunks: another graph, and only one."""
    monkeypatch.setitem(_plan._CHUNK_BYTES, "cpu", 128 * V * 2 * 2)  # 128 tokens of both models
    graphs = Graphs()
    run = compiled(linear, graphs)
    for n, count in ((100, 1), (110, 2), (127, 2), (130, 3), (200, 3), (300, 3)):
        results(run, from_hidden(n, BF16))
        assert len(graphs) == count


@BOTH
def test_twice_in_one_graph(function, backend):
    def call(*inputs):
        first = function(*inputs, divergence="jsd", backend=backend)
        return first + 2 * function(*inputs, kd_ratio=0.2, temperature=2.0, backend=backend)

    same(call, MAKERS[function]())


@BOTH
def test_checkpointed_in_a_graph(function, backend):
    def call(*inputs):
        return checkpoint(lambda *x: function(*x, kd_ratio=0.5, backend=backend), *inputs, use_reentrant=False)

    same(call, MAKERS[function]())


def test_autocast_in_a_graph(backend):
    graphs = Graphs()

    def call(*inputs):
        with torch.autocast("cpu", BF16):
            return linear(*inputs, kd_ratio=0.5, backend=backend)

    inputs = from_hidden()
    same(call, inputs, graphs)
    assert not torch.equal(call(*inputs), linear(*inputs, kd_ratio=0.5, backend=backend))  # it did round to bf16


@BOTH
def test_scaled_gradients_in_a_graph(function, backend):
    """As ``torch.amp.GradScaler`` scales a loss in fp16: the gradients carry the scale."""
    scale = 2.0**12

    def call(*inputs, factor=scale):
        return factor * function(*inputs, kd_ratio=0.5, backend=backend)

    inputs = MAKERS[function](dtype=torch.float16)
    same(call, inputs)
    scaled, plain = (results(lambda *x, f=f: call(*x, factor=f), inputs) for f in (scale, 1.0))
    for big, small in zip(scaled, plain, strict=True):
        torch.testing.assert_close(big, small * scale, rtol=2e-3, atol=2e-7 * scale)


def test_scale_in_a_graph(backend):
    same(lambda *inputs: softmax_kd_loss(*inputs, kd_ratio=0.5, scale=0.25, backend=backend), MAKERS[softmax_kd_loss]())


@BOTH
def test_export_holds_the_operator(function):
    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs, divergence="jsd", kd_ratio=0.5)

    inputs = tuple(t.detach() for t in MAKERS[function]())
    program = torch.export.export(Loss(), inputs)
    name = f"{NAMESPACE}.{'softmax_kd' if function is softmax_kd_loss else 'linear_kd'}."
    text = "".join(str(m.graph) for m in program.graph_module.modules() if hasattr(m, "graph"))
    assert text.count(name) == 1
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs), rtol=0, atol=0)
