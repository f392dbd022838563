"""The plan of a run whose teacher is a cache."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from helpers.cached import cached, write
from helpers.measured import measured_step, sized_config, weight_bytes
from torchtune_kd.config.reading import read_config
from torchtune_kd.errors import UserError
from torchtune_kd.plan import as_dict, as_text, plan_run, read_request
from torchtune_kd.plan.communication import Layout
from torchtune_kd.plan.memory import plan_memory
from torchtune_kd.plan.meta_models import as_run, build_models
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.teachers.cached_sparse import signal_of

KINDS = {
    "states": {"dtype": "bf16"},
    "top_k": {"dtype": None, "kind": "top_k", "k": 16},
    "sampled": {"dtype": None, "kind": "sampled"},
}


@pytest.mark.heavy
@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.nightly)])
def test_the_memory_is_what_a_run_takes(tmp_path, kind, stored):
    cfg = sized_config(tmp_path, 50, kind)
    cfg.kd_loss.temperature = 1.0
    manifest = write(cfg, tmp_path / "cache", **KINDS[stored])
    cfg = cached(cfg, tmp_path / "cache")
    config = read_config(cfg)
    config = replace(config, signal=signal_of(config, manifest))
    planned, dry = plan_memory(config, as_run(build_models(config)), Layout(), sequence=128)
    measured, run = measured_step(cfg, KDRecipe)
    assert planned.teacher + planned.student == weight_bytes(run)
    assert planned.total == pytest.approx(measured, rel=0.1)
    assert not any(operation.flops for operation in dry.operations if operation.phase == "teacher")


def planned(cfg, **more):
    return plan_run(*read_request(OmegaConf.merge(cfg, {"device": "cuda", "dtype": "bf16"} | more)))


def test_one_that_is_yet_to_be_written_is_planned_from_the_teacher(tmp_path):
    """And says what it will take: no body, no forward, two bytes a channel."""
    cfg = sized_config(tmp_path, 50, "full")
    live, from_cache = planned(cfg), planned(cfg, teacher_cache=str(tmp_path / "cache"))
    width, vocab = cfg.teacher_model.embed_dim, cfg.teacher_model.vocab_size
    assert from_cache.stored_bytes == 2 * width == as_dict(from_cache)["torchtune_kd"]["cache_bytes_per_token"]
    assert live.stored_bytes is None and "from the cache" not in as_text(live)
    assert from_cache.parameters.teacher == width * vocab
    assert from_cache.flops.get("teacher", 0) == 0 < live.flops["teacher"]
    assert from_cache.times["H100"].total < live.times["H100"].total and from_cache.memory.total < live.memory.total
    assert f"from the cache: {2 * width:,} bytes a token" in as_text(from_cache)


def test_one_that_is_there_says_what_it_holds(tmp_path):
    cfg = sized_config(tmp_path, 12, "full")
    write(cfg, tmp_path / "cache", dtype="int8")
    plan = planned(cached(cfg, tmp_path / "cache"))
    assert plan.stored_bytes == cfg.teacher_model.embed_dim + 2
    with pytest.raises(UserError, match="is none: correct the path"):
        planned(cached(cfg, tmp_path / "elsewhere"))


@pytest.mark.heavy
@pytest.mark.parametrize("head", [None, "float8"])
def test_the_head_alone_is_gathered(tmp_path, head):
    cfg = sized_config(tmp_path, 50, "full", teacher_head=head)
    live, from_cache = planned(cfg, devices=2), planned(cfg, devices=2, teacher_cache=str(tmp_path / "cache"))
    assert from_cache.communication.teacher_layers == 0 < live.communication.teacher_layers
    assert from_cache.communication.heads < live.communication.heads
    assert from_cache.memory.teacher < live.memory.teacher
