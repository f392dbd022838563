"""A teacher's head in 8-bit floats, against a rounding to e4m3 and products in fp64 that share no code with it.

Legend: N tokens, V vocabulary, D hidden width of the teacher.
"""

import math

import pytest
import torch
from allocations import Memory

from helpers import oracle
from helpers.grid_checks import make_inputs
from torchtune_kd.kernels import Float8Weight, _float8, _plan, float8_weight, linear_kd_loss, on_meta
from torchtune_kd.kernels._operators import NAMESPACE

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FLOAT8 = torch.float8_e4m3fn
D = 48


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round fp64 numbers of at most 448 to 4 significant bits, or below 2^-6 to multiples of 2^-9, ties to even."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return torch.round(x / step) * step


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return what is left of rows ``[N, D]`` in 8 bits with a scale each, in fp64."""
    x = x.detach().float()
    scale = (x.abs().amax(-1, keepdim=True) * (1 / 448)).double()  # the product in fp32: another one moves ties
    return torch.where(scale > 0, e4m3(x.double() / scale.clamp(min=1e-300)) * scale, 0.0)


def inputs_of(dtype: torch.dtype = F32, **sizes: int) -> dict[str, torch.Tensor]:
    return make_inputs(**{"teacher_d": D, "dtype": dtype, **sizes})


def teacher_logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the rounded numbers, themselves rounded once."""
    z = rounded(inputs["teacher_hidden"]) @ rounded(inputs["teacher_weight"]).t()
    if inputs["teacher_bias"] is not None:
        z += inputs["teacher_bias"].double()
    return z.to(inputs["teacher_hidden"].dtype).double()


def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The logits ``[N, V]`` as the loss computes them, into a buffer of NaN."""
    data, scale = float8_weight(weight)
    out = torch.full((len(hidden), len(data)), math.nan, dtype=hidden.dtype)
    _float8.Float8Product(data, scale, bias, len(scale), hidden.dtype)(hidden, out)
    return out[:, : len(scale)]


def quantised(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**inputs, "teacher_weight": float8_weight(inputs["teacher_weight"])}


# ------------------------------------------------------------------------------------------------- quantising


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("v", [1, 63, 64, 1000])
def test_a_head_is_rounded_row_by_row(v, dtype, device):
    weight = (torch.randn(v, D) * torch.logspace(-3, 2, v).unsqueeze(-1)).to(dtype)
    data, scale = float8_weight(weight)
    assert data.dtype == FLOAT8
    assert data.shape == (math.ceil(v / 64) * 64, D)
    assert scale.dtype == F32
    torch.testing.assert_close(scale.double(), weight.abs().amax(-1).double() / 448, rtol=2e-7, atol=0)
    found, right = data[:v].double() * scale.double().unsqueeze(-1), rounded(weight)
    wrong = (found - right).abs() > 1e-6 * right.abs()
    assert wrong.double().mean() <= 1e-4  # the quotient in fp32 may be halfway between two numbers of e4m3
    assert (found - right).abs().max() <= right.abs().max() / 8
    assert not data[v:].float().any()


def test_powers_of_two_are_rounded_exactly(device):
    """With a largest element of 448·2^k the scale is 2^k, and every element is the number of e4m3 next to it."""
    rows = torch.randn(40, D, dtype=F64)
    rows[:, 0] = 448
    rows *= 2.0 ** torch.arange(-20, 20).unsqueeze(-1)
    data, scale = float8_weight(rows.float())
    torch.testing.assert_close(scale.double(), 2.0 ** torch.arange(-20, 20).double(), rtol=2e-7, atol=0)
    exact = rows.float().double() / 2.0 ** torch.arange(-20, 20).unsqueeze(-1)
    assert ((data[:40].double() - e4m3(exact)).abs() > 0).double().mean() <= 1e-3  # where 448/448 is not 1 in fp32


def test_a_head_is_quantised_a_few_rows_at_a_time(monkeypatch):
    """The same to the bit, and no copy in fp32."""
    weight = torch.randn(1000, D, dtype=BF16)
    whole = float8_weight(weight)
    seen = {tensor.nbytes for tensor in (weight, *whole)}
    monkeypatch.setitem(_plan._BLOCK_ELEMENTS, "cpu", 10 * D)
    with Memory(torch.device("cpu")) as memory:
        parts = float8_weight(weight)
    assert torch.equal(parts.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(parts.scale, whole.scale)
    assert max(size for size in memory.made if size not in seen) <= 10 * D * 4


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rows_of_zeros_and_of_the_smallest_numbers(dtype, device):
    rows = torch.zeros(5, D, dtype=dtype)
    rows[1, 3] = torch.finfo(dtype).smallest_normal
    rows[2] = torch.finfo(dtype).tiny
    rows[3] = torch.finfo(dtype).max
    data, scale = float8_weight(rows)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert data.float().isfinite().all()
    assert not data[0].float().any()
    assert not data[4].float().any()
    assert torch.equal(data[3].float(), torch.full((D,), 448.0))


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_what_is_no_number_becomes_nan_in_its_row_alone(wrong, device):
    hidden, weight = torch.randn(3, D), torch.randn(10, D)
    weight[2, 1] = hidden[1, 5] = wrong
    nan = product(hidden, weight).isnan()
    assert nan[1].all()
    assert nan[:, 2].all()
    assert nan.sum() == 10 + 3 - 1


# -------------------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("v", [1, 50, 64, 1000])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_are_those_of_the_rounded_numbers(with_bias, dtype, v, device):
    """Products of e4m3 are exact in fp32, so that only the sum's roundings and the last one are left."""
    hidden, weight = torch.randn(20, D).to(dtype), torch.randn(v, D).to(dtype)
    bias = torch.randn(v).to(dtype) if with_bias else None
    data, scale = float8_weight(weight)
    h8, h_scale = _float8.quantised_rows(hidden)
    right = (h8.double() @ data[:v].double().t()) * h_scale.double() * scale.double()
    if with_bias:
        right += bias.double()
    found = product(hidden, weight, bias)
    unit = {F64: 0.0, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    slack = 2e-6 * math.sqrt(D)
    if device == "cuda" and dtype == BF16:  # Hopper keeps 14 bits or so of the sum within an instruction
        slack = 2.0**-11 * (h8.double().abs() @ data[:v].double().abs().t()) * h_scale.double() * scale.double()
    assert ((found.double() - right).abs() <= slack + unit * right.abs()).all()


def test_emulated_sums_of_whole_numbers_are_exact():
    """Rows whose largest element is 448: nothing is rounded before the end, nor is the sum."""
    hidden, weight = (torch.randint(-8, 9, (n, D)).double() for n in (30, 200))
    hidden[:, 0] = weight[:, 0] = 448
    found = product(hidden.bfloat16(), weight.bfloat16())
    assert torch.equal(found, (hidden @ weight.t()).bfloat16())


@pytest.mark.parametrize("elements", [1, 3 * D, 10**9])
def test_the_emulation_holds_no_head_in_fp32(monkeypatch, elements):
    monkeypatch.setitem(_plan._BLOCK_ELEMENTS, "cpu", elements)
    hidden, weight = torch.randn(7, D, dtype=BF16), torch.randn(1000, D, dtype=BF16)
    head = float8_weight(weight)
    out = torch.empty(7, len(head.data), dtype=BF16)
    run = _float8.Float8Product(*head, None, 1000, BF16)
    with Memory(torch.device("cpu")) as memory:
        run(hidden, out)
    if elements < 10**9:
        seen = {tensor.nbytes for tensor in (out, *head)}
        assert max(size for size in memory.made if size not in seen) <= max(elements, hidden.numel()) * 4
    torch.testing.assert_close(out[:, :1000], product(hidden, weight), rtol=2e-2, atol=0)


def scaled_mm(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum, out):
    """Stand for the product of a GPU, with what it asks of its arguments."""
    assert a.dtype == b.dtype == FLOAT8
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert a.shape[1] % 16 == 0
    assert b.shape[1] % 16 == 0
    for scale, shape in ((scale_a, (len(a), 1)), (scale_b, (1, b.shape[1]))):
        assert scale.dtype == F32
        assert scale.shape == shape
        assert scale.is_contiguous()
    assert out.dtype == out_dtype == BF16
    assert out.shape == (len(a), b.shape[1])
    assert out.is_contiguous()
    assert not use_fast_accum
    z = a.float() @ b.float() * scale_b * scale_a
    if bias is not None:
        assert bias.dtype == BF16
        assert bias.shape == b.shape[1:]
        z += bias
    out.copy_(z)


# A student with fewer ids than the teacher, more ids, as many; odd numbers and round ones.
VOCABULARIES = [(60, 60), (64, 64), (50, 60), (60, 50), (100, 70), (70, 130), (1, 1)]


@pytest.mark.parametrize(("v", "teacher_v"), VOCABULARIES)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_of_a_gpu_is_the_emulation(with_bias, chunk_tokens, v, teacher_v, backend, monkeypatch):
    """With a stand-in, which is exact: what is handed to the product, and what becomes of the padding."""
    inputs = inputs_of(BF16, v=v)
    inputs["teacher_weight"] = torch.randn(teacher_v, D).bfloat16()
    inputs["teacher_bias"] = torch.randn(teacher_v).bfloat16() if with_bias else None
    inputs["labels"].clamp_(max=min(v, teacher_v) - 1)
    settings = {"kd_ratio": 0.5, "chunk_tokens": chunk_tokens, "teacher_head_dtype": "float8", "return_metrics": True}

    def run():
        loss, metrics = linear_kd_loss(**inputs, **settings)
        leaves = [t for t in inputs.values() if t is not None and t.requires_grad]
        return [loss.detach(), *metrics.values(), *torch.autograd.grad(loss, leaves)]

    emulated = run()
    monkeypatch.setattr(_float8, "has_float8_product", lambda device, dtype: True)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    for found, right in zip(run(), emulated, strict=True):
        # bf16 logits at a boundary between two numbers fall to the one side or the other
        assert (found.double() - right.double()).norm() <= 1e-2 * right.double().norm() + 1e-6


@pytest.mark.parametrize(
    ("capability", "version", "dtype", "hip", "expected"),
    [
        ((9, 0), "2.6.0", BF16, None, True),
        ((8, 9), "2.6.0", BF16, None, False),
        ((8, 9), "2.11.0", BF16, None, True),
        ((10, 0), "2.11.0", BF16, None, True),
        ((8, 0), "2.11.0", BF16, None, False),
        ((9, 0), "2.11.0", F32, None, False),
        ((9, 4), "2.11.0", BF16, "6.2", False),
    ],
)
def test_which_gpus_have_the_product(capability, version, dtype, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert _float8.has_float8_product(torch.device("cuda"), dtype) == expected
    assert not _float8.has_float8_product(torch.device("cpu"), dtype)


# ----------------------------------------------------------------------------------------------------- the loss


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
