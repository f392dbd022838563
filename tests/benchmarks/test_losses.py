"""``benchmarks.losses``: its counts against numbers worked out by hand, its truth and its adapters against fp64."""

import itertools

import pytest
import torch

from helpers import oracle
from helpers.checkout import benchmarks as part
from helpers.interpreter import patch_language_once_a_launch

patch_language_once_a_launch()

cases, counts, inputs_of = part("losses._case"), part("losses._counts"), part("losses._inputs")
implementations, cells = part("losses._implementations"), part("losses._cell")
Case = cases.Case

SOFTMAX = Case(tokens=32, vocab=300)
LINEAR = Case(op="linear", tokens=32, vocab=300, widths=(48, 64))


# Counts.


@pytest.mark.parametrize(
    ("case", "needed", "milliseconds"),
    [
        # 8192 · 128256 = 1.0507e9 elements; the table of bounds at 3.35 TB/s: 4, 10 and 14 bytes per element
        (Case(gradient=False), 4_202_692_608, 1.25),
        (Case(), 10_506_731_520, 3.14),
        (Case(divergence="reverse_kl"), 10_506_731_520, 3.14),
        (Case(divergence="jsd"), 14_709_424_128, 4.39),
        (Case(divergence="jsd", gradient=False), 8_405_385_216, 2.51),
        # half ignored: 8 bytes per element of a valid row, 2 per element of any
        (Case(ignored=0.5), 6_304_038_912, 1.88),
    ],
)
def test_bytes_of_softmax(case, needed, milliseconds):
    assert counts.work(case) == (needed, 0)
    least = counts.bound(case, counts.Rates(copy_bytes=3.35e12, matrix_flops=1.0))
    assert (least.seconds * 1e3, least.of) == (pytest.approx(milliseconds, abs=0.005), "memory")


@pytest.mark.parametrize(
    ("case", "flops", "milliseconds"),
    [
        # products with 2048 + 4096 (logits) + 2048 (hidden states) + 2048 (head), each 2 · 8192 · 128256 · width
        (Case(op="linear"), 2 * 8192 * 128256 * 8192, 21.5),
        (Case(op="linear", trainable_head=True), 2 * 8192 * 128256 * 10240, 26.9),
        (Case(op="linear", gradient=False), 2 * 8192 * 128256 * 6144, 16.1),
        (Case(op="linear", ignored=0.5), 2 * 4096 * 128256 * 8192, 10.8),
    ],
)
def test_operations_of_linear(case, flops, milliseconds):
    assert counts.work(case).flops == flops
    least = counts.bound(case, counts.Rates(copy_bytes=3.35e12, matrix_flops=800e12))
    assert (least.seconds * 1e3, least.of) == (pytest.approx(milliseconds, abs=0.06), "products")


def test_bytes_of_linear_and_the_longer_of_both_bounds():
    case = Case(op="linear", tokens=10, vocab=100, widths=(4, 8), ignored=0.2, trainable_head=True)
    # read: 8 valid tokens · 12 + heads 100 · 12; written: hidden 10 · 4, head 100 · 4; 2 bytes each
    assert counts.work(case) == (2 * (96 + 1200 + 40 + 400), 2 * 8 * 100 * (4 + 4 + 4 + 8))
    assert counts.bound(case, counts.Rates(3472.0, 1e9)) == (1.0, "memory")
    assert counts.bound(case, counts.Rates(1e9, 32000.0)) == (1.0, "products")


def test_instructions_bound_what_has_too_many():
    case = Case(ignored=0.5)
    rates = counts.Rates(1e15, 1e15, instructions=528 * 1.755e9)  # 4 schedulers on each of 132 SMs
    # 4096 · 128256 logits of valid tokens, 32 to a warp's instruction
    assert counts.bound_of(case, rates, 100.0) == (pytest.approx(1.771e-3, rel=1e-3), "instructions")
    assert counts.bound_of(case, rates._replace(copy_bytes=1e9), 100.0).of == "memory"
    assert counts.bound_of(case, rates, None) == counts.bound(case, rates)
    assert counts.bound_of(case, rates._replace(instructions=None), 100.0) == counts.bound(case, rates)


def test_metrics_of_a_loss_read_once_more_where_a_gradient_would():
    assert counts.passes("forward_kl", gradient=False, metrics=True) == 2
    assert counts.passes("forward_kl", gradient=True, metrics=True) == 2
    assert counts.passes("jsd", gradient=False, metrics=True) == 2


# Plans.


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_plan_names_each_case_once(device, quick):
    plan = cases.plan(device, quick)
    assert len({case.name for case in plan}) == len(plan)
    assert len({case._replace(peers="all") for case in plan}) == len(plan)


def test_full_plan_covers_what_is_promised():
    plan = cases.plan("cuda")
    for op in ("softmax", "linear"):
        of_op = [case for case in plan if case.op == op]
        assert {case.tokens for case in of_op} >= {1024, 4096, 8192, 16384}
        assert {case.vocab for case in of_op} >= {49152, 128256, 151936}
        assert {case.temperature for case in of_op} == {1, 2}
        assert {case.ignored for case in of_op} == {0, 0.5, 0.8}
        assert {case.gradient for case in of_op} == {True, False}
    assert {case.trainable_head for case in plan} == {True, False}
    assert {case.tokens for case in plan} >= {32768, 65536}
    assert {case.divergence for case in plan} == set(implementations.EVERY)
    assert {(case.divergence, case.metrics) for case in plan if case.metrics} >= {("forward_kl", "kl"), ("jsd", "all")}
    assert {case.divergence for case in plan if case.temperature == 2} == set(implementations.EVERY)
    assert {case.metrics for case in cases.plan("cpu")} == {"", "kl", "all"}
    assert set(cases.plan("cuda", quick=True)) <= set(plan)


# Truth and adapters.


@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
@pytest.mark.parametrize("divergence", implementations.EVERY)
def test_truth_is_the_oracle_of_the_tests(divergence, kd_ratio):
    case = SOFTMAX._replace(divergence=divergence, kd_ratio=kd_ratio, temperature=2.0, ignored=0.5)
    inputs = inputs_of.make_inputs(case, "cpu")
    (truth,) = inputs_of.fp64_truths(inputs, [case])
    student = inputs.student.double().requires_grad_()
    beta = {"symmetric_kl": 0.5, "jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}.get(divergence)
    loss = oracle.mean(student, inputs.teacher.double(), inputs.labels, divergence, beta, 2.0, kd_ratio)
    (grad,) = torch.autograd.grad(loss, student)
    assert (inputs.labels == inputs_of.IGNORE).sum() == case.n_ignored == 16
    assert truth.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(truth.grad, grad[: inputs_of.SLICE], rtol=1e-9, atol=1e-15)


VARIATIONS = {
    "main": {},
    "temperature, ignored, trained": {"temperature": 2.0, "ignored": 0.5, "trainable_head": True},
    "divergence alone": {"kd_ratio": 1.0},
    "loss": {"gradient": False},
}


def adapters():
    """Every implementation with every divergence and variation; of interpreted ones most are slow."""
    for one in implementations.IMPLEMENTATIONS:
        interpreted = one.key.startswith("ours-triton")
        slow = one.key.endswith("compile")
        for op, divergence, variation in itertools.product(one.ops, one.divergences, VARIATIONS):
            one_of_many = interpreted and variation != "main" and divergence not in ("forward_kl", "jsd")
            marks = pytest.mark.slow if slow or one_of_many else ()
            name = f"{one.key}-{op}-{divergence}-{variation}"
            yield pytest.param(one, op, divergence, variation, id=name, marks=marks)


@pytest.mark.parametrize(("one", "op", "divergence", "variation"), adapters())
def test_adapter_computes_what_it_says(one, op, divergence, variation, monkeypatch):
    """bf16 logits of a linear case are wrong by 0.4 %; Liger's chunks also take their logarithms in bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if one.missing(device):
        pytest.skip(f"{one.key}: {one.missing(device)}")
    monkeypatch.setattr(part("_device"), "FLUSH_BYTES", 1)
    interpreted = device == "cpu" and one.key.startswith("ours-triton")  # a row takes milliseconds
    case = (SOFTMAX if op == "softmax" else LINEAR)._replace(divergence=divergence, **VARIATIONS[variation])
    case = case._replace(tokens=8) if interpreted else case
    inputs = inputs_of.make_inputs(case, device)
    (truth,) = inputs_of.fp64_truths(inputs, [one.effective(case)])
    cell = cells.measure_cell(one, inputs, truth, case, budget=0)
    assert cell.missing is None
    assert cell.repeats == 3
    tolerance = 0.05 if one.key == "liger-chunked" else 0.015
    assert cell.loss_error < tolerance
    assert cell.gradient_error is None if not case.gradient else cell.gradient_error < tolerance


@pytest.mark.parametrize("metrics", ["kl", "all"])
@pytest.mark.parametrize("op", ["softmax", "linear"])
def test_metrics_are_asked_for(op, metrics, monkeypatch):
    asked = {}
    module = implementations.kernels()
    right = getattr(module, f"{op}_kd_loss")

    def call(*args, **kwargs):
        result = right(*args, **kwargs)
        asked.update(result[1])
        return result

    monkeypatch.setattr(module, f"{op}_kd_loss", call)
    case = (SOFTMAX if op == "softmax" else LINEAR)._replace(metrics=metrics)
    loss, _ = cells.run(cells.find("ours-torch", op), inputs_of.make_inputs(case, "cpu"), case)
    assert loss.shape == ()
    assert set(asked) == {"num_tokens", *(module.METRICS if metrics == "all" else ("kl",))}


def test_gradient_of_a_trained_head_is_asked_for():
    case = LINEAR._replace(trainable_head=True)
    one = cells.find("ours-torch", "linear")
    _, grads = cells.run(one, inputs_of.make_inputs(case, "cpu"), case)
    assert [tuple(grad.shape) for grad in grads] == [(32, 48), (300, 48)]


def test_lacks_change_what_is_asked_and_are_noted():
    fla = cells.find("fla-fused-kl", "linear")
    case = LINEAR._replace(temperature=2.0, ignored=0.5)
    asked = fla.effective(case)
    assert (asked.kd_ratio, asked.temperature, asked.ignored) == (1.0, 1.0, 0.0)
    assert fla.notes(case) == ["cross_entropy", "temperature", "ignored"]
    assert fla.notes(LINEAR._replace(kd_ratio=1.0)) == []
    assert {name for one in implementations.IMPLEMENTATIONS for name in one.lacks} == set(implementations.LACKS)
