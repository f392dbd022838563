"""A head and hidden states in 8-bit floats, against a rounding to e4m3 and products in fp64 that share no code with it.

Legend: N tokens, V vocabulary, D hidden width of the teacher.
"""

import math

import pytest
import torch
from allocations import Memory

from helpers.float8 import FLOAT8, D, e4m3, inputs_of, rounded
from torchtune_kd.kernels import _float8, _plan, float8_weight, linear_kd_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The logits ``[N, V]`` as the loss computes them, into a buffer of NaN."""
    data, scale = float8_weight(weight)
    out = torch.full((len(hidden), len(data)), math.nan, dtype=hidden.dtype)
    _float8.Float8Product(data, scale, bias, len(scale), hidden.dtype)(hidden, out)
    return out[:, : len(scale)]


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
