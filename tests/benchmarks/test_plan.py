"""``benchmarks/plan.py``: the stock recipe beside ours, in its JSON and as a page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.checkout import CHECKOUT, benchmarks
from helpers.measured import sized_config

plan = benchmarks("plan")


@pytest.fixture
def config(tmp_path):
    cfg = sized_config(tmp_path, 1, "lora")
    cfg.device = "cuda"
    return cfg


def test_both_recipes_add_up(config):
    config.merge_with({"devices": 4, "gpu": "H100", "sequence_length": 64})
    found = plan.both(config)
    for recipe in (found["torchtune_kd"], found["stock"]):
        memory = recipe["memory"]
        assert memory["total"] == sum(memory["at_peak"].values()) == memory["phases"][memory["peak_phase"]]
        assert recipe["fits"] and recipe["largest_batch_size"] > 1000
        assert set(recipe["flops_per_step"]) == {"teacher", "student", "loss", "backward"}
        assert recipe["communication_per_step"]["gradients"] > 0
        assert recipe["seconds_per_step"]["H100"]["total"] > 0
    ours, stock = found["torchtune_kd"], found["stock"]
    assert ours["memory"]["total"] < stock["memory"]["total"]
    assert ours["communication_per_step"]["heads"] < stock["communication_per_step"]["heads"]
    assert "it would take" not in plan.as_text(found)


def test_a_teachers_head_in_8_bits_is_ours_alone(config):
    plain = plan.both(config)
    config.teacher_head = "float8"
    found = plan.both(config)
    assert found["stock"] == plain["stock"]
    assert found["torchtune_kd"]["memory"]["most"] != plain["torchtune_kd"]["memory"]["most"]


@pytest.mark.parametrize("key", ["fsdp_cpu_offload", "enable_activation_offloading"])
def test_no_time_is_expected_of_a_run_that_offloads(config, key):
    config.merge_with({"devices": 2, "gpu": "H100", key: True, "enable_activation_checkpointing": True})
    found = plan.both(config)
    assert found["torchtune_kd"]["seconds_per_step"] is found["stock"]["seconds_per_step"] is None


def test_padded_vocabularies_and_no_teacher_leave_the_stock_recipe_out(config):
    config.teacher_model.vocab_size = 400
    found = plan.both(config)
    assert found["stock"] is None and "its losses fail where heads differ (384 and 400 ids)" in plan.as_text(found)
    config.kd_ratio = 0.0
    found = plan.both(config)
    assert found["stock"] is None and "it always runs a teacher" in plan.as_text(found)


def test_what_the_stock_recipe_lacks_is_said(config):
    config.kd_loss._component_ = "torchtune_kd.losses.JSDLoss"
    config.model._component_ = config.teacher_model._component_
    for key in [key for key in config.model if key not in config.teacher_model]:
        del config.model[key]
    page = plan.as_text(plan.both(config))
    assert "has no jsd: its forward KL is taken" in page and "what it would take to train this student" in page


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["json=True"]], ids=["page", "json"])
def test_the_command_prints_both(tmp_path, config, arguments):
    OmegaConf.save(config, tmp_path / "c.yaml")
    command = [str(Path(sys.executable).parent / "tune"), "run", "benchmarks/plan.py", "--config", tmp_path / "c.yaml"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=CHECKOUT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    if arguments:
        assert json.loads(result.stdout)["stock"]["memory"]["total"] > 0
    else:
        assert result.stdout.startswith("per device and step ")
