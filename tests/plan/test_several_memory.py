"""The plan's memory is what a run with several teachers, or with the student's own past, takes."""

import pytest

from helpers.cached import write
from helpers.measured import sized_config
from helpers.planned import check_memory, check_two_processes
from helpers.several import members, with_teachers

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
    check_memory(with_teachers(cfg, *(known[name] for name in names), **more))


@pytest.mark.heavy
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_plan_is_what_specialists_take(tmp_path, kind):
    """All rows belong to the last teacher, the worst case: the first teacher's part has left a gradient of the head."""
    cfg = sized_config(tmp_path, 12, kind, batch_size=2)
    cfg.dataset = [cfg.dataset, cfg.dataset]
    entries = [members(cfg)[name] | {"datasets": [1 - at]} for at, name in enumerate(("wide", "narrow"))]
    check_memory(with_teachers(cfg, *entries))


@pytest.mark.slow
@pytest.mark.nightly
def test_plan_is_what_two_processes_take(tmp_path):
    """FSDP2 over gloo, as in test_memory.py."""
    check_two_processes(tmp_path, "several", cases=4)
