"""The plan's memory is what a run with several teachers, or with the student's own past, takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cached import write
from helpers.measured import measured_step, sized_config, weight_bytes
from helpers.several import members, with_teachers
from torchtune_kd.plan import Layout, build_models, plan_memory
from torchtune_kd.plan.meta_models import as_run
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.training import read_config

WORKER = Path(__file__).with_name("fsdp_memory_worker.py")


def check(cfg):
    config = read_config(cfg)
    planned = plan_memory(config, as_run(build_models(config)), Layout(), sequence=128)[0]
    measured, run = measured_step(cfg, KDRecipe)
    print(
        f"planned {planned.total / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB, highest in {planned.peak_phase}"
    )
    assert planned.teacher + planned.student == weight_bytes(run)
    assert planned.total == pytest.approx(measured, rel=0.1)
    assert sum(planned.at_peak.values()) == planned.total == max(planned.phases.values())


NIGHTLY = pytest.mark.nightly


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "names", "more"),
    [
        ("lora", ["wide", "narrow"], {}),
        ("full", ["ema"], {}),
        pytest.param("full", ["wide", "narrow"], {"ensemble": "logits"}, marks=NIGHTLY),
        pytest.param("full", ["wide", "stored"], {}, marks=NIGHTLY),
        pytest.param("full", ["ema", "narrow"], {"enable_activation_checkpointing": True}, marks=NIGHTLY),
        pytest.param("full", ["ema"], {"dtype": "fp32"}, marks=NIGHTLY),
        pytest.param("lora", ["ema"], {}, marks=NIGHTLY),
        pytest.param("lora", ["base"], {}, marks=NIGHTLY),
        pytest.param("qlora", ["base", "wide"], {}, marks=NIGHTLY),
        pytest.param("dora", ["base"], {"enable_activation_checkpointing": True}, marks=NIGHTLY),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list | dict) else value,
)
def test_plan_is_what_a_small_run_takes(tmp_path, kind, names, more):
    cfg = sized_config(tmp_path, 12, kind, batch_size=2)
    known = members(cfg)
    if "stored" in names:
        write(cfg, tmp_path / "cache", dtype="bf16")
        known["stored"] = {"cache": str(tmp_path / "cache")}
    check(with_teachers(cfg, *(known[name] for name in names), **more))


@pytest.mark.heavy
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_plan_is_what_specialists_take(tmp_path, kind):
    """The first microbatches are all of the last one's rows: the worst case, since the first left a head's gradient."""
    cfg = sized_config(tmp_path, 12, kind, batch_size=2)
    cfg.dataset = [cfg.dataset, cfg.dataset]
    entries = [members(cfg)[name] | {"datasets": [1 - at]} for at, name in enumerate(("wide", "narrow"))]
    check(with_teachers(cfg, *entries))


@pytest.mark.slow
@pytest.mark.nightly
def test_plan_is_what_two_processes_take(tmp_path):
    """FSDP2 over gloo, as in test_memory.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(WORKER), str(tmp_path), "several"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2 * 4
    for line in lines:
        print(line)
        assert line["planned weights"] == pytest.approx(line["measured weights"], rel=1e-4)
        assert line["planned"] == pytest.approx(line["measured"], rel=0.12)
