"""Every sweep under configs/: all of its runs read, and its head names commands that are there."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from torchtune_kd._torchtune import recipe_registry
from torchtune_kd.evaluation.tasks import check_task
from torchtune_kd.sweeps.request import read_request
from torchtune_kd.sweeps.runs import plan_runs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
pytestmark = pytest.mark.heavy
FILES = sorted(CONFIGS.rglob("sweep*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_reads(path):
    request = read_request(OmegaConf.load(path))
    seeds = plan_runs(request)
    assert len({run.id for runs in seeds for run in runs}) == sum(map(len, seeds)) >= 3 * len(request.cells)
    for task in request.keys.evaluate["tasks"]:
        check_task(task)
    names = {cell.name for cell in request.cells}
    baselines = re.findall(r"baseline=(\S+)", path.read_text())
    assert baselines and set(baselines) <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_heads_name_what_is_there(path):
    text = path.read_text()
    configs = {config.name for recipe in recipe_registry().get_all_recipes() for config in recipe.configs}
    name = f"torchtune_kd/{path.relative_to(CONFIGS).with_suffix('').as_posix()}"
    assert f"tune run torchtune_kd/sweep --config {name}\n" in text and name in configs
    assert f"results=[{OmegaConf.load(path).output_dir}/results.jsonl]" in text
    assert set(re.findall(r"--config (\S+)", text)) <= configs


def test_there_are_sweeps():
    assert len(FILES) >= 2
