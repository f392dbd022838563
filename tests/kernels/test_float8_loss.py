"""The loss of a teacher's head in 8-bit floats, against an independent rounding; what is refused; graphs, meta tensors.

Legend: N tokens, V vocabulary, D hidden width of the teacher.
"""

import math

import pytest
import torch
from allocations import Memory

from helpers import oracle
from helpers.float8 import FLOAT8, D, inputs_of, quantised, teacher_logits
from torchtune_kd.kernels import Float8Weight, _float8, float8_weight, linear_kd_loss, on_meta
from torchtune_kd.kernels._operators import NAMESPACE

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def values_and_gradients(loss, inputs):
    return loss.detach(), torch.autograd.grad(loss, [t for t in inputs.values() if t.requires_grad])


@pytest.mark.parametrize(("chunk_tokens", "t", "kd_ratio"), [(None, 1.0, 1.0), (4, 2.0, 0.3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_are_those_of_the_rounded_numbers(
    divergence, with_bias, chunk_tokens, t, kd_ratio, backend, device
):
    inputs = inputs_of()
    if not with_bias:
        inputs["teacher_bias"] = None
    s = inputs["student_hidden"].double() @ inputs["student_weight"].double().t() + inputs["student_bias"].double()
    data, scale = float8_weight(inputs["teacher_weight"])
    h8, h_scale = _float8.quantised_rows(inputs["teacher_hidden"])
    z = (h8.double() * h_scale.double()) @ (data[: len(scale)].double() * scale.double().unsqueeze(-1)).t()
    z = z if inputs["teacher_bias"] is None else z + inputs["teacher_bias"].double()
    truth = oracle.mean(s, z, inputs["labels"], divergence, None if divergence in NO_BETA else BETA, t, kd_ratio)
    named = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    right, expected = values_and_gradients(truth, named)
    found, grads = values_and_gradients(
        linear_kd_loss(
            **inputs,
            divergence=divergence,
            beta=None if divergence in NO_BETA else BETA,
            temperature=t,
            kd_ratio=kd_ratio,
            chunk_tokens=chunk_tokens,
            teacher_head_dtype="float8",
        ),
        named,
    )
    assert found.item() == pytest.approx(right.item(), rel=1e-5, abs=1e-6)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert (grad - expected_grad).abs().max() <= 2e-5 * expected_grad.abs().max() + 1e-8


NO_BETA, BETA = ("forward_kl", "reverse_kl", "tvd"), 0.3


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_it_is_the_loss_of_logits_rounded_by_an_independent_e4m3(dtype):
    """Near the loss that the oracle's own rounding of hidden states and head gives, and not that of the bf16 head."""
    inputs = inputs_of(dtype, n=200, v=500)
    s = torch.nn.functional.linear(*(inputs[f"student_{name}"] for name in ("hidden", "weight", "bias"))).double()
    right = oracle.mean(s, teacher_logits(inputs), inputs["labels"], "forward_kl")
    loss = linear_kd_loss(**inputs, teacher_head_dtype="float8")
    plain = linear_kd_loss(**inputs)
    assert loss.item() == pytest.approx(right.item(), rel=1e-3)
    assert abs(loss - right) < 0.2 * abs(plain - right)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_head_quantised_before_is_the_same(reduction, backend, device):
    inputs = inputs_of(BF16)
    settings = {"reduction": reduction, "temperature": 2.0, "kd_ratio": 0.5, "chunk_tokens": 5}
    first = linear_kd_loss(**inputs, teacher_head_dtype="float8", **settings)
    for again in (quantised(inputs), {**quantised(inputs), "teacher_head_dtype": "float8"}):
        leaves = [t for t in inputs.values() if t.requires_grad]
        loss = linear_kd_loss(**again, **settings)
        assert torch.equal(loss, first)
        ours, theirs = (torch.autograd.grad(value.sum(), leaves, retain_graph=True) for value in (loss, first))
        assert all(map(torch.equal, ours, theirs))


def test_rows_of_zeros_give_no_nan(divergence, backend, device):
    inputs = inputs_of(BF16)
    inputs["teacher_weight"][3] = 0
    inputs["teacher_hidden"][4] = 0
    loss, metrics = linear_kd_loss(
        **inputs, divergence=divergence, kd_ratio=0.5, teacher_head_dtype="float8", return_metrics=True
    )
    _, grads = values_and_gradients(loss, inputs)
    assert loss.isfinite()
    assert all(value.isfinite() for value in metrics.values())
    assert all(grad.isfinite().all() for grad in grads)


def test_ids_at_minus_infinity_by_the_bias(backend):
    inputs = inputs_of(BF16)
    for model in ("student", "teacher"):
        inputs[f"{model}_bias"] = inputs[f"{model}_bias"].detach().index_fill(0, torch.tensor([7]), -math.inf)
    inputs["labels"][inputs["labels"] == 7] = 8
    loss = linear_kd_loss(**inputs, teacher_head_dtype="float8")
    assert loss.isfinite()
    assert torch.autograd.grad(loss, inputs["student_hidden"])[0].isfinite().all()


def test_autocast_decides_on_the_dtype_of_the_logits():
    inputs = inputs_of(F32)
    with torch.autocast("cpu", BF16):
        first, second = linear_kd_loss(**quantised(inputs)), linear_kd_loss(**inputs)
    halves = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    head = float8_weight(inputs["teacher_weight"])  # of fp32, as the one before
    assert torch.equal(first, linear_kd_loss(**{**halves, "teacher_weight": head}))
    assert first != second


def test_without_a_teacher_nothing_is_quantised():
    inputs = inputs_of(teacher_d=5)
    loss = linear_kd_loss(**inputs, kd_ratio=0.0, teacher_head_dtype="float8")
    assert torch.equal(loss, linear_kd_loss(**inputs, kd_ratio=0.0))


# ---------------------------------------------------------------------------------------------------- refusals


def head(**changes):
    parts = {"data": torch.zeros(64, D, dtype=FLOAT8), "scale": torch.ones(60)}
    return Float8Weight(**{**parts, **changes})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (head(data=torch.zeros(64, D)), "teacher_weight.data must be torch.float8_e4m3fn, but got torch.float32"),
        (head(scale=torch.ones(60).half()), "teacher_weight.scale must be torch.float32, but got torch.float16"),
        (head(scale=[1.0]), "teacher_weight.scale must be a tensor, but got list"),
        (head(scale=torch.ones(70)), r"to fit teacher_hidden, but got \[70\] and \[64, 48\]; make it by float8_weight"),
        (head(scale=torch.ones(60, 1)), r"scale \[V\].*but got \[60, 1\]"),
        (head(data=torch.zeros(64, 32, dtype=FLOAT8)), r"but got \[60\] and \[64, 32\]"),
        (head(data=torch.zeros(D, 64, dtype=FLOAT8).t()), "contiguous data"),
        (head(scale=torch.ones(60, device="meta")), "teacher_weight.scale must be on the device of teacher_hidden"),
        (head(data=torch.zeros(5056, D, dtype=FLOAT8), scale=torch.ones(5000)), "60 ids and the teacher 5000"),
    ],
)
def test_heads_that_float8_weight_did_not_make(weight, message):
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(**{**inputs_of(), "teacher_weight": weight, "teacher_bias": None})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([[0.0] * D], "weight must be a tensor, but got list"),
        (torch.ones(9, D, dtype=torch.int64), "weight must be a floating-point tensor"),
        (torch.ones(9, D, requires_grad=True), r"weight must not require grad.*pass weight.detach\(\)"),
        (torch.ones(D), r"weight must be \[V, D\], but got \[48\]"),
        (torch.ones(9, 0), r"weight must be \[V, D\], but got \[9, 0\]"),
        (
            torch.ones(9, 40),
            "8-bit floats need a teacher whose hidden width is a multiple of 16, but that of weight is",
        ),
    ],
)
def test_what_cannot_be_quantised(weight, message):
    with pytest.raises(ValueError, match=message):
        float8_weight(weight)


def test_a_bias_that_does_not_fit():
    inputs = quantised(inputs_of())
    for bias, message in (
        (torch.randn(61), r"teacher_bias must be \[V\] = \[60\], but got \[61\]"),
        (torch.randn(60, requires_grad=True), "teacher_bias must not require grad"),
        (torch.randn(60, device="meta"), "teacher_bias must be on the device of teacher_hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_kd_loss(**{**inputs, "teacher_bias": bias})


# ------------------------------------------------------------------------------------------ graphs, meta tensors


def test_opcheck():
    torch.library.opcheck(getattr(torch.ops, NAMESPACE).float8_weight.default, (torch.randn(70, 32, dtype=BF16),))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("when", ["before", "in the call", "in the graph"])
def test_compiled_is_eager(when, reduction, backend):
    torch._dynamo.reset()
    inputs = inputs_of(BF16)
    if when == "before":
        inputs = quantised(inputs)

    def call(inputs):
        if when == "in the graph":
            inputs = quantised(inputs)
        settings = {"teacher_head_dtype": "float8"} if when == "in the call" else {}
        return linear_kd_loss(**inputs, kd_ratio=0.5, reduction=reduction, **settings)

    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    eager, graph = (f(inputs) for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")))
    assert torch.equal(eager, graph)
    assert all(map(torch.equal, *(torch.autograd.grad(loss.sum(), leaves) for loss in (eager, graph))))


def meta_inputs(dtype=BF16, v=4000):
    inputs = {name: torch.empty_like(t, device="meta") for name, t in inputs_of(dtype, n=700, v=v).items()}
    return {**inputs, "labels": torch.zeros(700, dtype=torch.int64)}


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_memory_and_products_without_values_are_those_of_the_device(dtype):
    found = []
    for device in ("cpu", "meta"):
        inputs = inputs_of(dtype, n=700, v=4000, ignored=0) if device == "cpu" else meta_inputs(dtype)
        with torch.no_grad(), on_meta("cpu"), Memory(torch.device(device)) as memory:
            linear_kd_loss(**quantised(inputs), kd_ratio=0.5)
        found.append((memory.products, memory.peak))
    assert found[1][0] == found[0][0]
    assert found[1][1] == pytest.approx(found[0][1], rel=0.02)


def test_a_gpu_without_values_tells_of_its_product():
    told = []
    inputs = quantised(meta_inputs())
    account = lambda flops, size: told.append((flops, size))  # noqa: E731
    with torch.no_grad(), on_meta("cuda", account_product=account), Memory(torch.device("meta")) as memory:
        linear_kd_loss(**inputs)
    n, v = 700, 4032
    assert told == [(2 * n * v * D, n * D + v * D + n * v * 2)]
    assert not [shapes for shapes in memory.products if shapes[1][1] == D]  # it is not computed as well
    assert max(memory.made) == n * v * 2


def test_chunks_are_those_of_the_logits():
    """Logits have the dtype of the hidden states, whatever the head's."""
    inputs = meta_inputs(v=128256)
    rows = []
    for given in (inputs, quantised(inputs)):
        with torch.no_grad(), on_meta("cuda"), Memory(torch.device("meta")) as memory:
            linear_kd_loss(**given)
        rows.append(max(memory.made))
    assert rows[0] == rows[1]
