"""The plan's memory is what a run takes: measured on the CPU, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.modules import loss as stock_losses

from helpers.checkout import benchmarks
from helpers.measured import SIZES, allocated, sized_config, weight_bytes
from helpers.planned import check_memory, check_two_processes, plan
from helpers.tiny import make_config
from torchtune_kd.plan import Layout, build_models, count_parameters, fits, largest_batch, plan_memory
from torchtune_kd.plan.memory import GIB
from torchtune_kd.plan.meta_models import as_run
from torchtune_kd.plan.meta_models import weight_bytes as planned_weights
from torchtune_kd.plan.tracker import tensor_bytes
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.training import read_config

stock_step = benchmarks("_stock_step")
CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("full", {}),
        ("full", {"enable_activation_checkpointing": True, "gradient_accumulation_steps": 1}),
        ("full", {"optimizer___component_": "torchtune_kd.training.master_adamw.MasterAdamW"}),
        ("full", {"kd_ratio": 1.0, "dtype": "fp32", "clip_grad_norm": 1.0}),
        ("lora", {}),
        ("lora", {"teacher_head": "float8"}),
        ("full", {"teacher_weights": "int8"}),
        ("lora", {"teacher_weights": "nf4"}),
        ("full", {"teacher_head": "float8", "dtype": "fp32"}),
        ("dora", {"enable_activation_checkpointing": True}),
        ("qlora", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_plan_is_what_a_small_run_takes(tmp_path, kind, overrides):
    check_memory(sized_config(tmp_path, 1, kind, **overrides))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("size", [size for size in SIZES if size > 1])
def test_plan_is_what_a_run_takes(tmp_path, size, kind):
    check_memory(sized_config(tmp_path, size, kind, batch_size=1 if size == max(SIZES) else 2))


@pytest.mark.slow
def test_plan_is_what_two_processes_take(tmp_path):
    """FSDP2 over gloo: shares, gathered layers, gradients whole until a step's last microbatch."""
    check_two_processes(tmp_path, "one", cases=3)


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 30 * GIB, reason="needs a GPU with 30 GiB"
)
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_plan_is_what_the_true_8b_to_1b_takes_on_a_gpu(tmp_path, kind):
    small = make_config(tmp_path)
    cfg = OmegaConf.load(CHECKOUT / "configs" / "llama3_2" / f"8B_to_1B_KD_{kind}_single_device.yaml")
    cfg.merge_with({"checkpointer": None, "teacher_checkpointer": None, "random_weights": True})
    cfg.merge_with({"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "out"), "batch_size": 2})
    cfg.tokenizer = {**small.tokenizer, "max_seq_len": 513}
    cfg.dataset = sized_config(tmp_path / "rows", 1, "full").dataset
    planned = plan(cfg, sequence=512)
    recipe = KDRecipe(cfg)
    recipe.setup()
    torch.cuda.reset_peak_memory_stats()
    recipe.train()
    recipe.cleanup()
    measured = torch.cuda.max_memory_allocated()
    print(f"{kind}: planned {planned.total / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB")
    assert planned.total == pytest.approx(measured, rel=0.1)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_stock_recipe_takes_what_is_said_of_it(tmp_path, kind):
    """Its loss step, on the CPU: torchtune's models and losses in the order of its recipe."""
    cfg = sized_config(tmp_path, 12, kind, gradient_accumulation_steps=1, batch_size=2)
    config = read_config(cfg, distributed=False)
    planned = plan_memory(config, build_models(config), Layout(), 128, run=stock_step.dry_stock_step)[1]
    recipe = KDRecipe(cfg)
    recipe.setup()
    student, teacher = recipe._run.student.decoder, recipe._run.teacher.teacher.decoder
    held = weight_bytes(recipe._run)
    for decoder in (student, teacher):
        del decoder.unembed
        decoder.set_num_output_chunks(8)
    batch = next(iter(recipe._run.loader))
    kd_loss, class_loss = stock_losses.ForwardKLWithChunkedOutputLoss(), stock_losses.CEWithChunkedOutputLoss()

    def step():
        logits = student(batch.tokens)
        with torch.no_grad():
            teacher_logits = teacher(batch.tokens)
        loss = 0.5 * kd_loss(logits, teacher_logits, batch.labels) + 0.5 * class_loss(logits, batch.labels)
        del logits, teacher_logits
        loss.backward()

    assert max(planned.peaks.values()) == pytest.approx(held + allocated(step)[0], rel=0.1)
    recipe.cleanup()


def test_nf4_is_counted_with_its_scales():
    weight = to_nf4(torch.zeros(512, 512, dtype=torch.bfloat16))
    # 4 bits a weight, 8 a block of 64, 16 a scaler block of 256 such, then 16 code values and a mean in bf16
    assert tensor_bytes(weight) == 512 * 512 * (4 + 8 / 64 + 16 / (64 * 256)) / 8 + 2 * (16 + 1)


def test_a_quantised_teacher_has_as_many_weights(tmp_path):
    """Scales are no weights: they count as bytes alone."""
    plain, int8, nf4 = (
        build_models(read_config(sized_config(tmp_path, 12, "lora", teacher_weights=kind), distributed=False))
        for kind in (None, "int8", "nf4")
    )
    counts = [count_parameters(models).teacher for models in (plain, int8, nf4)]
    assert counts == [sum(weight.numel() for weight in plain.teachers[0].model.parameters())] * 3
    plain, int8, nf4 = (planned_weights(models.teachers[0].model) for models in (plain, int8, nf4))
    assert nf4 < int8 < plain


@pytest.mark.slow
def test_shares_shrink_with_the_number_of_processes():
    cfg = OmegaConf.load(CHECKOUT / "configs" / "llama3_2" / "8B_to_1B_KD_full_distributed.yaml")
    config = read_config(cfg, distributed=True)
    models = build_models(config)
    one, two, eight = (plan_memory(config, models, Layout(n, 1, True), 64)[0] for n in (1, 2, 8))
    teacher = 8_030_261_248 * 2  # Llama 3.1 8B in bf16
    assert two.teacher - eight.teacher == teacher // 2 - teacher // 8
    assert two.optimizer == 4 * eight.optimizer == 2 * 1_235_814_400 * 2 / 2  # Llama 3.2 1B, two moments in bf16
    assert two.gradients == eight.gradients == 1_235_814_400 * 2  # whole until the last microbatch
    assert one.gathered == 0 < two.gathered == eight.gathered
    assert one.teacher == planned_weights(models.teachers[0].model)
    often = config.with_keys({"gradient_accumulation_steps": 1})
    once = plan_memory(often, models, Layout(8, 1, True), 64)[0]
    assert once.gradients < 0.35 * eight.gradients  # the embedding's whole, an eighth of the layers'
    copies = plan_memory(config, models, Layout(4, 2, True), 64)[0]
    assert copies.teacher - eight.teacher == teacher // 4 - teacher // 8


def test_offloading_leaves_no_layer_inputs(tmp_path):
    cfg = sized_config(tmp_path, 12, "full", enable_activation_checkpointing=True, gradient_accumulation_steps=1)
    cfg.device = "cuda"
    inside = plan(cfg, sequence=128)
    cfg.enable_activation_offloading = True
    outside = plan(cfg, sequence=128)
    inputs = 4 * 4 * 128 * 256 * 2  # layers x B x S x D in bf16
    last_norm = 2 * 4 * 128 * 256 * 4  # its input and result in fp32
    assert inputs <= inside.activations - outside.activations <= inputs + last_norm + 2**16


def test_fsdp_cpu_offload_leaves_the_shares_to_the_host():
    cfg = OmegaConf.load(CHECKOUT / "configs" / "llama3_2" / "8B_to_1B_KD_lora_distributed.yaml")
    cfg.fsdp_cpu_offload = True
    config = read_config(cfg, distributed=True)
    memory = plan_memory(config, build_models(config), Layout(2, 1, True), 64)[0]
    assert memory.teacher < 0.1 * GIB and memory.optimizer == 0 and memory.gathered > 2 * GIB


@pytest.mark.heavy
@pytest.mark.parametrize("shards", [1, 8])
def test_a_head_in_8_bits_is_half_as_large_and_whole_on_every_process(shards):
    cfg = OmegaConf.load(CHECKOUT / "configs" / "llama3_2" / "8B_to_1B_KD_full_distributed.yaml")
    config = read_config(cfg, distributed=True)
    layout = Layout(shards, 1, True)
    with_head = config.with_keys({"teacher_head": "float8"})
    plain, float8 = (plan_memory(c, as_run(build_models(c)), layout, 64)[0] for c in (config, with_head))
    vocab, width = 128256, 4096  # Llama 3.1 8B's own head
    in_8_bits, in_bf16 = vocab * width + 4 * vocab, 2 * vocab * width
    assert float8.teacher - plain.teacher == pytest.approx(in_8_bits - in_bf16 // shards, abs=1)
    if shards > 1:  # it is not gathered
        assert plain.gathered - float8.gathered == in_bf16
    assert float8.total < plain.total


def test_unknown_optimizer_is_said_not_guessed(tmp_path):
    cfg = sized_config(tmp_path, 1, "full", optimizer___component_="torch.optim.Adafactor")
    memory = plan(cfg, sequence=64)
    assert memory.optimizer is None and memory.total is None


@pytest.mark.parametrize("room", [0, 1, 7, 100, 10**4])
def test_largest_batch_is_the_last_that_fits(room):
    """Whatever the memory's shape: affine, with steps, flat at first."""
    for shape in (lambda b: 5 * b, lambda b: 3 * b + 40 * (b // 7), lambda b: max(30, 4 * b), lambda b: 30):
        known = {4: shape(4) * GIB}
        found = largest_batch(lambda b, f=shape: f(b) * GIB, room * GIB, known, most=3000)
        fitting = [b for b in range(1, 3001) if fits(shape(b) * GIB, room * GIB)]
        assert found == max(fitting, default=0)
        assert len(known) < 60
