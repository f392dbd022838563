"""linear_kd_loss against the fp64 formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from helpers import oracle
from helpers.grid import GRID, VALUES
from helpers.grid_checks import check_hidden, logits, make_inputs
from torchtune_kd.kernels import METRICS, Objective, _checks, _chunks, linear_kd_loss, softmax_kd_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def leaves(inputs):
    return [t for t in inputs.values() if t.requires_grad]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, leaves(inputs), materialize_grads=True)


# A third of the cases each: chunks chosen, of 50 tokens (which do not divide 129), of one token.
@pytest.mark.parametrize((*VALUES, "chunk_tokens"), [(*case, (None, 50, 1)[i % 3]) for i, case in enumerate(GRID)])
def test_grid(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens, device):
    check_hidden(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens)


@pytest.mark.parametrize("t", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_equal_models_have_no_loss_and_exactly_no_gradient(divergence, beta, t, dtype, backend, device):
    inputs = make_inputs(v=300, dtype=dtype)
    for name in ("hidden", "weight", "bias"):
        inputs[f"teacher_{name}"] = inputs[f"student_{name}"].detach().clone()
    loss = linear_kd_loss(**inputs, divergence=divergence, beta=beta, temperature=t, chunk_tokens=5)
    assert 0 <= loss <= 1e-6
    assert not any(grad.any() for grad in gradients(loss, inputs))


@pytest.mark.parametrize("chunk_tokens", [None, 4, 64])
def test_an_fp16_head_gradient_that_leaves_the_range_before_it_is_divided(chunk_tokens, backend):
    """64 tokens of one kind: the sum of their contributions is 64 times the mean, beyond 65504."""
    n, v, d = 64, 5, 4
    teacher = torch.randn(d)
    inputs = {
        "student_hidden": torch.full((n, d), 2000.0),
        "student_weight": torch.zeros(v, d),
        "teacher_hidden": teacher.expand(n, d),
        "teacher_weight": torch.randn(v, d) * 5,
    }
    inputs = {name: tensor.half() for name, tensor in inputs.items()}
    inputs["student_weight"].requires_grad_()
    labels = torch.zeros(n).long()
    z = inputs["student_hidden"].double() @ inputs["student_weight"].double().t()
    truth = oracle.mean(z, F.linear(inputs["teacher_hidden"], inputs["teacher_weight"]).double(), labels, "forward_kl")
    (right,) = torch.autograd.grad(truth, inputs["student_weight"])
    assert (right.double() * n).abs().max() > 65504
    loss = linear_kd_loss(**inputs, labels=labels, chunk_tokens=chunk_tokens)
    (grad,) = torch.autograd.grad(loss, inputs["student_weight"])
    assert (grad.double() - right.double()).abs().max() <= 2e-3 * right.abs().max()


# One chunk, chunks that do not divide the 14 valid tokens, one token per chunk; T on both sides of 1.
@pytest.mark.parametrize(
    ("chunk_tokens", "t", "kd_ratio"), [(None, 1.0, 1.0), (4, 2.0, 0.3), (1, 0.5, 0.5), (5, 8.0, 0.0)]
)
def test_value_and_gradients(divergence, beta, chunk_tokens, t, kd_ratio, backend, device):
    inputs = make_inputs()
    truth = oracle.mean(*logits(inputs, F64), inputs["labels"], divergence, beta, t, kd_ratio)
    loss = linear_kd_loss(
        **inputs, divergence=divergence, beta=beta, temperature=t, kd_ratio=kd_ratio, chunk_tokens=chunk_tokens
    )
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-6)
    expected = gradients(truth, inputs) if truth.requires_grad else [torch.zeros_like(t) for t in leaves(inputs)]
    for ours, right in zip(gradients(loss, inputs), expected, strict=True):
        assert ours.dtype == F32
        assert (ours - right).abs().max() <= 1e-5 * right.abs().max() + 1e-8


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_low_precision_is_as_right_as_plain_torch(divergence, chunk_tokens, dtype, backend, device):
    inputs = make_inputs(n=48, v=1000, d=64, teacher_d=96, dtype=dtype)
    beta = Objective(divergence).beta
    kwargs = {"divergence": divergence, "beta": beta, "temperature": 2.0, "kd_ratio": 0.5}
    truth = oracle.mean(*logits(inputs, F64), inputs["labels"], **kwargs)
    plain = oracle.mean(*(z.float() for z in logits(inputs, dtype)), inputs["labels"], **kwargs)
    loss = linear_kd_loss(**inputs, chunk_tokens=chunk_tokens, **kwargs)
    # logits are rounded in both; the rest of the error is theirs alone
    assert abs(loss - truth) <= 1.1 * abs(plain - truth) + 2e-3 * truth
    triples = zip(gradients(loss, inputs), gradients(plain, inputs), gradients(truth, inputs), strict=True)
    for ours, theirs, right in triples:
        assert ours.dtype == dtype
        right = right.double()
        assert (ours - right).norm() <= 1.1 * (theirs - right).norm() + 2e-3 * right.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(divergence, reduction):
    inputs = make_inputs(n=5, v=4, d=3, teacher_d=2, dtype=F64, ignored=4)

    def loss(hidden, weight, bias):
        changed = {**inputs, "student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        return linear_kd_loss(
            **changed, divergence=divergence, temperature=1.7, kd_ratio=0.6, reduction=reduction, chunk_tokens=2
        )

    assert torch.autograd.gradcheck(loss, leaves(inputs))


def test_equals_the_loss_of_logits(divergence, device):
    inputs = make_inputs(dtype=F64)
    kwargs = {"divergence": divergence, "temperature": 2.0, "kd_ratio": 0.5}
    from_hidden = linear_kd_loss(**inputs, chunk_tokens=5, return_metrics=True, **kwargs)
    from_logits = softmax_kd_loss(*logits(inputs, F64), inputs["labels"], return_metrics=True, **kwargs)
    assert torch.allclose(from_hidden[0], from_logits[0])
    assert from_hidden[1].keys() == from_logits[1].keys() == {*METRICS, "num_tokens"}
    for name, value in from_logits[1].items():
        assert torch.allclose(from_hidden[1][name], value), name
    for ours, theirs in zip(gradients(from_hidden[0], inputs), gradients(from_logits[0], inputs), strict=True):
        assert torch.allclose(ours, theirs)


def test_batch_and_sequence_dimensions(backend):
    inputs = make_inputs(n=24)
    flat = linear_kd_loss(**inputs, reduction="none")
    shaped = {
        name: t.view(4, 6, *t.shape[1:]) if name in ("student_hidden", "teacher_hidden", "labels") else t
        for name, t in inputs.items()
    }
    assert torch.equal(linear_kd_loss(**shaped, reduction="none"), flat.view(4, 6))
    assert torch.equal(linear_kd_loss(**shaped), linear_kd_loss(**inputs))


def test_head_gradient_is_accumulated_in_fp32():
    """300 chunks of one token: summed in bf16, contributions below 1/256 of the sum would be lost."""
    inputs = make_inputs(n=300, v=40, d=8, dtype=BF16, ignored=0)
    exact = {name: t.detach().double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact["student_weight"].requires_grad_()
    truth = oracle.tokens(*logits(exact, F64), inputs["labels"], "forward_kl").sum()
    (right,) = torch.autograd.grad(truth, exact["student_weight"])
    for chunk_tokens in (300, 1):
        loss = linear_kd_loss(**inputs, reduction="sum", chunk_tokens=chunk_tokens)
        (grad,) = torch.autograd.grad(loss, inputs["student_weight"])
        assert (grad - right).norm() < 0.01 * right.norm()


def test_weight_trains_while_hidden_does_not(backend):
    inputs = make_inputs()
    both = dict(zip(("h", "w", "b"), gradients(linear_kd_loss(**inputs), inputs), strict=True))
    inputs["student_hidden"] = inputs["student_hidden"].detach()
    weight, bias = gradients(linear_kd_loss(**inputs), inputs)
    assert torch.equal(weight, both["w"])
    assert torch.equal(bias, both["b"])


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_token_gives_a_connected_zero(n, reduction, backend, device):
    inputs = make_inputs(n=n, ignored=1)
    loss = linear_kd_loss(**inputs, kd_ratio=0.5, reduction=reduction)
    assert not loss.any()
    for grad in torch.autograd.grad(loss.sum(), leaves(inputs), allow_unused=False):
        assert not grad.any()
        assert grad.isfinite().all()


def test_kd_ratio_0_touches_no_teacher(backend):
    inputs = make_inputs()
    truth = oracle.mean(*logits(inputs, F64), inputs["labels"], "forward_kl", kd_ratio=0.0)
    inputs["teacher_hidden"] = inputs["teacher_weight"] = inputs["teacher_bias"] = None
    assert linear_kd_loss(**inputs, kd_ratio=0.0).item() == pytest.approx(truth.item(), rel=1e-5)


def test_padded_vocabularies(divergence, backend):
    inputs = make_inputs(v=60)
    cut = linear_kd_loss(**inputs, divergence=divergence, kd_ratio=0.5)
    cut_grads = gradients(cut, inputs)
    wide = dict(inputs)
    wide["student_weight"] = torch.cat([inputs["student_weight"].detach(), torch.randn(4, 8)]).requires_grad_()
    wide["student_bias"] = torch.cat([inputs["student_bias"].detach(), torch.randn(4)]).requires_grad_()
    loss = linear_kd_loss(**wide, divergence=divergence, kd_ratio=0.5, chunk_tokens=5)
    assert torch.allclose(loss, cut)
    for ours, right in zip(gradients(loss, wide), cut_grads, strict=True):
        assert torch.allclose(ours[: len(right)], right, atol=1e-6)
        assert not ours[len(right) :].any()
    wide = dict(inputs, teacher_weight=torch.cat([inputs["teacher_weight"], torch.randn(4, 12)]))
    wide["teacher_bias"] = torch.cat([inputs["teacher_bias"], torch.randn(4)])
    assert torch.equal(linear_kd_loss(**wide, divergence=divergence, kd_ratio=0.5), cut)


def test_second_backward_checkpoint_and_inference_mode_teacher(backend):
    inputs = make_inputs()
    with torch.inference_mode():
        inputs["teacher_hidden"] = inputs["teacher_hidden"] + 0.0
    for reduction in ("mean", "none"):
        loss = linear_kd_loss(**inputs, reduction=reduction).sum()
        first = torch.autograd.grad(loss, leaves(inputs), retain_graph=True)
        doubled = torch.autograd.grad(loss, leaves(inputs), torch.tensor(2.0), retain_graph=True)
        for once, twice in zip(first, doubled, strict=True):
            assert torch.allclose(twice, 2 * once)

        def run(hidden, weight, bias, reduction=reduction):
            changed = {**inputs, "student_hidden": hidden, "student_weight": weight, "student_bias": bias}
            return linear_kd_loss(**changed, reduction=reduction).sum()

        again = checkpoint(run, *leaves(inputs), use_reentrant=False)
        for ours, right in zip(gradients(again, inputs), first, strict=True):
            assert torch.equal(ours, right)


def test_autocast_runs_the_products_in_its_dtype(backend):
    inputs = make_inputs(n=8, v=50, d=16)
    low = {name: t.detach().bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    low["student_hidden"].requires_grad_()  # the loss alone is computed another way
    with torch.autocast("cpu", dtype=BF16):
        loss = linear_kd_loss(**inputs, temperature=2.0)
        assert torch.equal(loss, linear_kd_loss(**low, temperature=2.0))
    for grad in gradients(loss, inputs):
        assert grad.dtype == F32


def test_autocast_leaves_fp64_alone_as_a_linear_layer_does():
    inputs = make_inputs(dtype=F64)
    with torch.autocast("cpu", dtype=BF16):
        loss = linear_kd_loss(**inputs)
    assert torch.equal(loss, linear_kd_loss(**inputs))
    inputs["student_weight"] = inputs["student_weight"].detach().float()
    with torch.autocast("cpu", dtype=BF16), pytest.raises(ValueError, match="must have one dtype"):
        linear_kd_loss(**inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_inside_autocast_is_the_one_outside(reduction, backend):
    inputs = make_inputs()
    loss = linear_kd_loss(**inputs, reduction=reduction).sum()
    outside = torch.autograd.grad(loss, leaves(inputs), retain_graph=True)
    with torch.autocast("cpu", dtype=BF16):
        inside = gradients(loss, inputs)
    for ours, right in zip(inside, outside, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("name", ["teacher_hidden", "teacher_weight", "teacher_bias", "labels"])
def test_what_backward_reads_again_must_not_change_meanwhile(name, backend):
    """Reduction "none" with a trainable head walks the chunks once more in backward."""
    inputs = make_inputs(ignored=0)
    loss = linear_kd_loss(**inputs, reduction="none", kd_ratio=0.5).sum()
    inputs[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(loss, inputs)


def test_changing_an_inference_tensor_meanwhile_changes_nothing():
    inputs = make_inputs(ignored=0)
    expected = gradients(linear_kd_loss(**inputs, reduction="none").sum(), inputs)
    with torch.inference_mode():
        inputs["teacher_hidden"] = inputs["teacher_hidden"].clone()
    loss = linear_kd_loss(**inputs, reduction="none").sum()
    with torch.inference_mode():
        inputs["teacher_hidden"].zero_()
    for ours, right in zip(gradients(loss, inputs), expected, strict=True):
        assert torch.equal(ours, right)


# The vocabularies of GPT-2 and Alpaca, and one of a multiple of 64.
@pytest.mark.parametrize("v", [50257, 32001, 128])
def test_rows_of_logits_lie_at_multiples_of_64(v, backend, monkeypatch):
    inputs = make_inputs(n=4, v=v, ignored=4)
    strides, plain = [], _chunks._logits

    def logits_into(hidden, weight, bias, out):
        assert out.shape[1] == v
        strides.append(out.stride())
        return plain(hidden, weight, bias, out)

    monkeypatch.setattr(_chunks, "_logits", logits_into)
    settings = {"temperature": 2.0, "kd_ratio": 0.5, "divergence": "jsd", "beta": 0.5}
    loss = linear_kd_loss(**inputs, chunk_tokens=2, **settings)
    assert set(strides) == {(-(-v // 64) * 64, 1)}
    truth = oracle.mean(*logits(inputs, F64), inputs["labels"], **settings)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for ours, right in zip(gradients(loss, inputs), gradients(truth, inputs), strict=True):
        assert (ours - right).abs().max() <= 1e-5 * right.abs().max() + 1e-8


def test_every_metric_and_divergence_beside_padding(divergence, backend, device):
    """The padding of the rows, 24 ids beside 40, adds to no value."""
    inputs = make_inputs(n=6, v=40, ignored=3)
    settings = {"divergence": divergence, "temperature": 2.0, "kd_ratio": 0.5}
    loss, sums = linear_kd_loss(**inputs, **settings, return_metrics=METRICS, chunk_tokens=2)
    expected, right = softmax_kd_loss(*logits(inputs), inputs["labels"], **settings, return_metrics=METRICS)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, value in right.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [40, 63, 64, -1])
def test_a_label_in_the_padding_is_none(label, monkeypatch):
    """Labels on a device are not looked at by the host: one outside of the vocabulary shows as NaN (Triton)."""
    monkeypatch.setattr(_checks, "host_can_read", lambda device: False)
    inputs = make_inputs(n=4, v=40, ignored=0)
    inputs["labels"][2] = label
    settings = {"kd_ratio": 0.5, "reduction": "none", "backend": "triton"}
    assert linear_kd_loss(**inputs, **settings).isnan().tolist() == [False, False, True, False]
    allowed = linear_kd_loss(**inputs, **settings, ignore_index=label)
    assert allowed[2] == 0 and allowed.isfinite().all()
