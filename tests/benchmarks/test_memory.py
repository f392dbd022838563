"""The memory that configs promise is what ``benchmarks.memory`` computes, and that is what a run takes."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from omegaconf import OmegaConf
from tiny import make_config
from torch.profiler import ProfilerActivity, profile
from torchao.dtypes.nf4tensor import to_nf4

from torchtune_kd.recipes.kd_single_device import KDRecipeSingleDevice
from torchtune_kd.training import accumulate_gradients

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = sorted((CHECKOUT / "configs").rglob("*.yaml"))


def benchmark() -> ModuleType:
    """benchmarks/memory.py, which is not installed."""
    name = "benchmarks_memory"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, CHECKOUT / "benchmarks" / "memory.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_holds_the_computed_memory(path):
    text = path.read_text()
    (line,) = re.findall(r"^# Memory per device.*$", text, re.MULTILINE)
    launched = re.search(r"tune run --nproc_per_node (\d+) torchtune_kd/", text)
    expected = benchmark().estimate(path, int(launched.group(1)) if launched else 1).header()
    number = r"\d+\.\d"
    assert re.sub(number, "x", line) == re.sub(number, "x", expected)
    assert [float(n) for n in re.findall(number, line)] == pytest.approx(
        [float(n) for n in re.findall(number, expected)], abs=0.11
    ), f"python -m benchmarks.memory --write {path}"


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("full", False), ("lora", False), ("dora", False), ("qlora", False), ("full", True)]
)
def test_estimate_is_what_a_step_takes(tmp_path, kind, checkpointing):
    cfg = make_config(
        tmp_path,
        kind,
        rows=["the quick brown fox jumps over the lazy dog, then sits in the sun"[:64]] * 16,
        batch_size=16,
        dtype="bf16",
        enable_activation_checkpointing=checkpointing,
    )
    cfg.tokenizer.max_seq_len = 65  # torchtune cuts text to one less: 16 x 64 tokens
    cfg.model.max_seq_len = cfg.teacher_model.max_seq_len = 65
    path = tmp_path / "tiny_single_device.yaml"
    OmegaConf.save(cfg, path)
    estimate = benchmark().estimate(path)

    recipe = KDRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    for model, expected in ((recipe._run.teacher, estimate.teacher), (recipe._run.student, estimate.student)):
        tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if not n.endswith("theta"))]
        assert expected == sum(map(benchmark()._bytes, tensors))
    batch = next(iter(recipe._run.loader))
    assert batch["tokens"].shape == (16, 64)
    metrics = recipe._run.log.wants(1)

    def step() -> None:
        accumulate_gradients(recipe._run.student, recipe._run.teacher, [batch], metrics, -100, recipe._run.world)

    peak, left = allocated(step)
    assert estimate.gradients == left
    assert estimate.gradients + estimate.loss + estimate.activations == pytest.approx(peak, rel=0.12)

    _, state = allocated(recipe._run.optimizer.step)
    assert estimate.optimizer == pytest.approx(state, rel=0.01)
    recipe.cleanup()


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``run`` has allocated at its highest point, and at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak, level


def test_nf4_is_counted_with_its_scales():
    weight = to_nf4(torch.zeros(512, 512, dtype=torch.bfloat16))
    # 4 bits a weight, 8 a block of 64, 16 a scaler block of 256 such, then 16 code values and a mean in bf16
    expected = 512 * 512 * (4 + 8 / 64 + 16 / (64 * 256)) / 8 + 2 * (16 + 1)
    assert benchmark()._bytes(weight) == expected


def test_shards_shrink_with_the_number_of_processes():
    path = CHECKOUT / "configs" / "llama3_2" / "8B_to_1B_KD_full_distributed.yaml"
    two, eight = (benchmark().estimate(path, n) for n in (2, 8))
    weights = 8_030_261_248 * 2  # Llama 3.1 8B in bf16
    assert two.teacher - eight.teacher == weights // 2 - weights // 8
    assert two.optimizer == 4 * eight.optimizer == 2 * 1_235_814_400 * 2 / 2  # Llama 3.2 1B, two moments in bf16
    assert two.gradients == eight.gradients == 1_235_814_400 * 2


def test_unknown_optimizer_is_said_not_guessed(tmp_path):
    cfg = make_config(tmp_path, optimizer___component_="torch.optim.Adafactor")
    path = tmp_path / "tiny_single_device.yaml"
    OmegaConf.save(cfg, path)
    estimate = benchmark().estimate(path)
    assert estimate.optimizer is None and estimate.total is None
    assert "gradients and optimizer ? GiB" in estimate.header()
