"""The memory that configs promise is what ``torchtune_kd/plan`` computes; tests/plan holds that to runs."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from helpers.tiny import make_config

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = sorted((CHECKOUT / "configs").rglob("*_KD_*.yaml"))  # sweeps are no runs


def benchmark() -> ModuleType:
    """benchmarks/memory.py, which is not installed."""
    name = "benchmarks_memory"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, CHECKOUT / "benchmarks" / "memory.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# a step of a large model takes seconds even on the meta device
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.parent.name == "smollm2" else pytest.mark.slow, id=p.stem) for p in FILES],
)
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


def test_the_parts_of_a_header_are_its_total(tmp_path):
    path = tmp_path / "tiny_single_device.yaml"
    OmegaConf.save(make_config(tmp_path), path)
    estimate = benchmark().estimate(path)
    assert estimate.part(*benchmark().PARTS) == estimate.memory.total
    assert "1 process, 4 x 64 tokens" in estimate.header() and "a CPU" in estimate.header()


def test_unknown_optimizer_is_said_not_guessed(tmp_path):
    path = tmp_path / "tiny_single_device.yaml"
    OmegaConf.save(make_config(tmp_path, optimizer___component_="torch.optim.Adafactor"), path)
    assert "gradients and optimizer ? GiB" in benchmark().estimate(path).header()
