"""Runs without files: who may, what the weights are, and that the true 8B -> 1B fits where it is said to fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.modules.peft import LoRALinear

from helpers.tiny import (
    STUDENT,
    make_config,
    model_section,
    read_log,
    run_in_process,
    run_tune,
    write_rows,
    write_tokenizer,
)
from torchtune_kd.models.random_weights import NoInitialValues, RandomWeights
from torchtune_kd.plan import Layout, build_models, plan_memory
from torchtune_kd.training import UserError, read_config

CHECKOUT = Path(__file__).resolve().parents[2]
WITHOUT_FILES = {"checkpointer": None, "teacher_checkpointer": None, "random_weights": True}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"checkpointer": None}, r"^`checkpointer: null` leaves a model without .*`random_weights: True`"),
        ({"teacher_checkpointer": None}, r"^`teacher_checkpointer: null` leaves a model without weights"),
        ({"random_weights": True}, r"`checkpointer` and `teacher_checkpointer` name files: set `checkpointer: null`"),
        ({"random_weights": True, "kd_ratio": 0.0}, r"but `checkpointer` names files"),
    ],
)
def test_a_model_is_random_by_two_words_or_not_at_all(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        read_config(make_config(tmp_path, **overrides), distributed=False)


def build(kind: str = "full", device: str = "cpu"):
    with torch.device(device):
        return config.instantiate(OmegaConf.create(model_section(kind, STUDENT)))


def test_values_follow_from_seed_model_and_name_alone():
    cpu, meta = build("lora"), build("lora", "meta")
    weights = RandomWeights(cpu, "model", torch.float32, seed=1)
    names = list(weights)
    assert names == [n for n, _ in build().named_parameters()] and len(weights) == len(names)
    same = RandomWeights(meta, "model", torch.float32, seed=1)
    for name in reversed(names):
        assert torch.equal(same[name], weights[name])
    query = "layers.0.attn.q_proj.weight"
    for section, seed in (("model", 2), ("teacher_model", 1)):
        other = RandomWeights(meta, section, torch.float32, seed)
        assert not torch.equal(other[query], weights[query])
    assert not torch.equal(weights["layers.0.attn.k_proj.weight"], weights["layers.0.attn.v_proj.weight"])

    weights.write_all(cpu)
    for name, parameter in cpu.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name])


def test_values_are_those_of_a_fresh_model():
    layer = torch.nn.Module()
    layer.matrix = torch.nn.Parameter(torch.empty(1500, 1000, device="meta"))  # more values than are drawn
    layer.bias = torch.nn.Parameter(torch.empty(3, device="meta"))
    layer.scale = torch.nn.Parameter(torch.empty(3, device="meta"))
    weights = RandomWeights(layer, "model", torch.bfloat16, seed=0)
    matrix = weights["matrix"].float()
    assert weights["matrix"].dtype == torch.bfloat16
    assert matrix.std().item() == pytest.approx(0.02, rel=0.01) and abs(matrix.mean().item()) < 1e-4
    assert len(matrix.unique(dim=0)) == 1500
    assert weights["bias"].tolist() == [0, 0, 0] and weights["scale"].tolist() == [1, 1, 1]


def test_nothing_is_drawn_that_will_be_overwritten():
    state = torch.get_rng_state()
    with NoInitialValues():
        build("lora")
    assert torch.equal(torch.get_rng_state(), state)
    layer = torch.nn.Linear(4, 4)  # outside it all is as before
    assert not torch.equal(torch.get_rng_state(), state) and layer.weight.abs().sum() > 0


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["full", "dora", "qlora"])
def test_a_run_without_files_trains_and_exports_nothing(tmp_path, kind, capsys):
    cfg = make_config(tmp_path, kind, dtype="bf16", optimizer__lr=5e-3, **WITHOUT_FILES)
    for file in tmp_path.rglob("model.safetensors"):
        file.unlink()
    run = run_in_process(cfg)
    assert "epoch 0: nothing is exported, since `checkpointer` is null" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("epoch_*"))
    losses = [step["loss"] for step in read_log(tmp_path / "out")]
    assert len(losses) == 6 and all(0 < loss < 20 for loss in losses)
    teacher, student = run.teacher.teacher.decoder, run.student.decoder
    expected = RandomWeights(teacher, "teacher_model", torch.bfloat16, cfg.seed)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in teacher.named_parameters())
    adapted = [module for module in student.modules() if isinstance(module, LoRALinear)]
    assert all(module.lora_b.weight.any() for module in adapted)


def test_one_model_may_be_random_and_the_other_from_files(tmp_path):
    cfg = make_config(tmp_path, "lora", teacher_checkpointer=None, random_weights=True)
    run_in_process(cfg)
    assert (tmp_path / "out" / "epoch_0" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_weights_do_not_depend_on_the_number_of_processes(tmp_path):
    cfg = make_config(tmp_path, "dora", rows=["a lazy dog"] * 16, max_steps_per_epoch=2, batch_size=2, **WITHOUT_FILES)
    cfg.gradient_accumulation_steps = 2
    cfg.output_dir = str(tmp_path / "one")
    run_in_process(cfg)
    cfg.output_dir, cfg.gradient_accumulation_steps = str(tmp_path / "two"), 1
    run_tune(cfg, "torchtune_kd/kd_distributed", nproc=2)
    for alone, together in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=1e-5)


GB = 10**9


@pytest.mark.slow
@pytest.mark.nightly
def test_the_true_8b_to_1b_step_fits_into_22_gb(tmp_path):
    """One whole step of the shipped config in bf16 on the CPU; skipped where the machine has no 22 GB free."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    if available < 21 * GB:
        pytest.skip(f"needs 21 GB of free memory, {available / GB:.1f} GB are free")
    write_tokenizer(tmp_path / "tokenizer.json")
    write_rows(tmp_path / "rows.jsonl", ["the quick brown fox jumps over the lazy dog"])
    cfg = OmegaConf.load(CHECKOUT / "configs" / "llama3_2" / "8B_to_1B_KD_lora_single_device.yaml")
    cfg.merge_with(WITHOUT_FILES)
    cfg.merge_with({"device": "cpu", "output_dir": str(tmp_path / "out"), "batch_size": 1, "max_steps_per_epoch": 1})
    cfg.gradient_accumulation_steps = 1
    cfg.tokenizer = {
        "_component_": "torchtune_kd.models.smollm2.smollm2_tokenizer",
        "path": str(tmp_path / "tokenizer.json"),
        "max_seq_len": 32,
    }
    cfg.dataset = make_config(tmp_path / "tiny").dataset
    cfg.dataset.data_files = str(tmp_path / "rows.jsonl")
    cfg.metric_logger.filename = "log.txt"
    OmegaConf.save(cfg, tmp_path / "true.yaml")
    program = (
        "import json, resource, sys\n"
        "from torchtune_kd.recipes.kd import recipe_main\n"
        "sys.argv = ['kd_single_device', '--config', sys.argv[1]]\n"
        "try:\n"
        "    recipe_main()  # ends in sys.exit\n"
        "finally:\n"
        "    print(json.dumps({'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "true.yaml")], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    peak = json.loads(result.stdout.splitlines()[-1])["peak"]
    print(f"peak resident memory: {peak / GB:.1f} GB")
    (step,) = read_log(tmp_path / "out")
    assert 0 < step["loss"] < 20 and step["grad_norm"] > 0 and step["acceptance_rate"] < 1
    assert peak < 22 * GB
    config = read_config(cfg, distributed=False)
    planned, _ = plan_memory(config, build_models(config), Layout(), sequence=31)
    assert planned.total == pytest.approx(peak, rel=0.1)  # the process' own memory is in the peak alone
