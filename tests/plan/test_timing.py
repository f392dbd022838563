"""FLOPs against closed formulas, bytes that travel against counting by hand, and the roofline between them."""

import dataclasses

import pytest
import torch
from torch import nn

from helpers.checkout import benchmarks
from helpers.measured import SIZES, sized_config
from helpers.several import members, with_teachers
from torchtune_kd.plan import Layout, build_models
from torchtune_kd.plan.communication import Communication, communication
from torchtune_kd.plan.devices import DEVICES, Device
from torchtune_kd.plan.dry_run import dry_step
from torchtune_kd.plan.meta_models import as_run
from torchtune_kd.plan.optimizer_cost import OptimizerCost
from torchtune_kd.plan.timing import (
    ACHIEVED_BANDWIDTH,
    ACHIEVED_FLOPS,
    ACHIEVED_LINK,
    FLOAT8_TIME,
    average_traffic,
    flops_by_phase,
    step_time,
)
from torchtune_kd.plan.timing import SECONDS_PER_OPERATION as LEAST
from torchtune_kd.plan.tracker import Operation
from torchtune_kd.training import read_config

stock_step = benchmarks("_stock_step")
NOTHING = Communication(0, 0, 0, 0, 0)
DEVICE = Device("test", 0, {"bf16": 100.0, "fp32": 10.0}, 1000.0, 100.0, "")
B, S = 4, 128


def body(layers, width, inner, heads=8, kv_heads=4):
    """FLOPs of a forward through the layers: two for each weight and token, and causal attention's S x S products."""
    head = width // heads
    weights = width * head * (2 * heads + 2 * kv_heads) + 3 * width * inner
    attention = 2 * (2 * B * heads * S * S * head)
    return layers * (2 * B * S * weights + attention)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    found = {}
    for kind in ("full", "lora"):
        cfg = sized_config(tmp_path_factory.mktemp(kind), 12, kind, enable_activation_checkpointing=kind == "full")
        config = read_config(cfg, distributed=False)
        found[kind] = config, build_models(config)
    return found


def test_flops_are_those_of_the_formulas(built):
    config, models = built["full"]
    teacher_layers, student_layers, width, inner, vocab = SIZES[12]
    flops = flops_by_phase(dry_step(config, models, B, S).operations, microbatches=1)
    head = 2 * B * S * vocab * width
    assert flops["teacher"] == body(teacher_layers, width, inner)
    assert flops["student"] == body(student_layers, width, inner)
    assert flops["loss"] == 4 * head  # both models' logits, gradients of hidden states and of the head
    # a checkpointed layer is computed again up to its last product, and gradients take two products for each; the
    # attention's take 2.5 times its forward
    again = body(student_layers, width, inner)
    last, attention = 2 * B * S * width * inner, 4 * B * S * S * width
    assert flops["backward"] == again - student_layers * last + 2 * again + student_layers * attention // 2
    twice = flops_by_phase(dry_step(config, models, B, S).operations, microbatches=2)
    assert twice == {phase: 2 * count for phase, count in flops.items()}

    stock = flops_by_phase(stock_step.dry_stock_step(config, models, B, S).operations, microbatches=1)
    assert stock["teacher"] == flops["teacher"] + head and stock["student"] == flops["student"] + head
    assert sum(stock.values()) == sum(flops.values())


def test_a_frozen_head_saves_its_gradient(built):
    config, models = built["lora"]
    *_, width, _, vocab = SIZES[12]
    flops = flops_by_phase(dry_step(config, models, B, S).operations, microbatches=1)
    assert flops["loss"] == 3 * 2 * B * S * vocab * width


def test_what_travels(built):
    config, models = built["full"]  # two microbatches a step
    settings = config.settings
    both = {"student": models.student, "teacher": models.teachers[0].model}
    weight = {id(p): p.numel() * 2 for model in both.values() for p in model.parameters()}
    layers = {name: sum(weight[id(p)] for p in model.layers.parameters()) for name, model in both.items()}
    rest = sum(weight.values()) - sum(layers.values())
    student = sum(weight[id(p)] for p in models.student.parameters())
    found = communication(models, settings, Layout(4, 2, True))
    assert found.teacher_layers == 2 * layers["teacher"] * 3 // 4  # in every microbatch
    assert found.student_layers == 4 * layers["student"] * 3 // 4  # and again for its backward pass
    assert found.heads == rest * 3 // 4  # once per step
    assert found.gradients == student * 3 // 4  # once per step
    assert found.replicas == 2 * (student // 4) // 2
    stock = stock_step.stock_communication(models, settings, Layout(4, 1, True))
    assert stock.gradients == 2 * found.gradients and stock.heads == 2 * found.heads and stock.replicas == 0
    assert communication(models, settings, Layout()).total == 0


def time(
    operations, layout=None, travels=NOTHING, trained=0, state=0.0, network=50.0, steps=1, device=DEVICE, average=0.0
):
    trainable = [nn.Parameter(torch.empty(trained, device="meta", dtype=torch.bfloat16))]
    cost = OptimizerCost(state, 0, 0)
    layout = layout or Layout()
    return step_time(operations, steps, trainable, cost, layout, travels, device, "bf16", network, average)


def test_an_operation_is_bound_by_what_takes_longest():
    flops, size = int(1e12), int(1e9)
    by_flops = flops / (100e12 * ACHIEVED_FLOPS)
    by_bytes = size / (1000e9 * ACHIEVED_BANDWIDTH)
    assert time([Operation("loss", flops, 1)]).phases["loss"] == pytest.approx(by_flops)
    assert time([Operation("loss", 1, size)]).phases["loss"] == pytest.approx(by_bytes)
    assert time([Operation("loss", 1, 1)], steps=3).phases["loss"] == pytest.approx(3 * LEAST)
    both = time([Operation("loss", flops, 1), Operation("teacher", 1, size)])
    assert both.total == pytest.approx(by_flops + by_bytes)


def test_a_product_of_8_bit_floats_is_faster_where_the_device_has_it():
    flops, size = int(1e12), int(1e9)
    one = [Operation("loss", flops, 1, float8=True)]
    assert time(one).total == pytest.approx(FLOAT8_TIME * flops / (100e12 * ACHIEVED_FLOPS))
    without = dataclasses.replace(DEVICE, float8=False)
    assert time(one, device=without).total == pytest.approx(flops / (10e12 * ACHIEVED_FLOPS))  # in fp32
    assert time([Operation("loss", 1, size, float8=True)]).total == pytest.approx(size / (1000e9 * ACHIEVED_BANDWIDTH))
    assert {device.name for device in DEVICES if not device.float8} == {"A100"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_head_in_8_bits_is_one_product_of_as_many_flops(tmp_path, dtype):
    """On a GPU in bf16; elsewhere it is emulated, and its products are of fp32."""
    cfg = sized_config(tmp_path, 12, "lora", dtype=dtype)
    cfg.device = "cuda"
    config = read_config(cfg, distributed=False)
    *_, width, _, vocab = SIZES[12]
    with_head = config.with_keys({"teacher_head": "float8"})
    plain, float8 = (dry_step(c, as_run(build_models(c)), B, S).operations for c in (config, with_head))
    assert flops_by_phase(float8, 1) == flops_by_phase(plain, 1)
    flops = [operation.flops for operation in float8 if operation.float8]
    assert sum(flops) == (2 * B * S * vocab * width if dtype == "bf16" else 0)
    assert not any(operation.float8 for operation in plain)


def test_the_optimizer_moves_weights_gradients_and_state():
    elements = 10**9
    expected = (3 * 2 + 2 * 4) * elements / (1000e9 * ACHIEVED_BANDWIDTH)
    assert time([], trained=elements, state=4.0).total == pytest.approx(expected)
    assert time([], Layout(4, 1, True), trained=elements, state=4.0).total == pytest.approx(expected / 4)


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 18), ("fp32", 12)])
def test_an_average_is_read_and_written_in_fp32_after_every_nth_step(tmp_path, dtype, size):
    """Also move a weight of bf16 on its way into fp32: it is read, written, and read again."""
    cfg = sized_config(tmp_path, 1, "lora", dtype=dtype)
    known = members(cfg)
    traffic = {}
    for every in (1, 4):
        ema = known["ema"] | {"every_n_steps": every}
        config = read_config(with_teachers(cfg, known["wide"], ema), distributed=False)
        traffic[every] = average_traffic(build_models(config))
    assert traffic == {1: size, 4: size / 4}
    assert average_traffic(build_models(read_config(cfg, distributed=False))) == 0


def test_the_optimizer_also_moves_the_average():
    elements = 10**9
    expected = (3 * 2 + 2 * 4 + 18) * elements / (1000e9 * ACHIEVED_BANDWIDTH)
    assert time([], trained=elements, state=4.0, average=18.0).phases["optimizer"] == pytest.approx(expected)
    shared = time([], Layout(4, 1, True), trained=elements, state=4.0, average=18.0)
    assert shared.phases["optimizer"] == pytest.approx(expected / 4)


def test_only_what_computation_cannot_hide_costs_time():
    second = 100e9 * ACHIEVED_LINK
    computing = [Operation("teacher", int(60e12 * 2), 1)]  # two seconds
    hidden = Communication(0, round(second), 0, 0, 0)
    assert time(computing, Layout(2, 1, True), hidden).exposed == 0
    first = Communication(0, 0, round(second), 0, 0)
    assert time(computing, Layout(2, 1, True), first).exposed == pytest.approx(1)
    longer = Communication(round(second), round(second), 0, round(second), 0)
    assert time(computing, Layout(2, 1, True), longer).exposed == pytest.approx(1)
    # more processes than a node has devices: the network is what is slow
    assert time([], Layout(16, 1, True), hidden).communication == pytest.approx(2)
    between = Communication(0, 0, 0, 0, round(second))
    assert time([], Layout(8, 2, True), between).communication == pytest.approx(2)
    assert time([], Layout(4, 2, True), between).communication == pytest.approx(1)
