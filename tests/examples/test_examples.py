"""The examples run as they stand, and what they claim holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.exports_environment import exports_python
from helpers.tiny import ROWS, make_config, read_log

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_plain_pytorch_comes_closer_to_the_teacher():
    lines = run(sys.executable, EXAMPLES / "plain_pytorch.py", "--device", "cpu", "--steps", "40").splitlines()
    numbers = [dict(zip(line.split()[::2], map(float, line.split()[1::2]), strict=True)) for line in lines]
    assert numbers[-1]["step"] == 39
    assert numbers[-1]["kl"] < 0.5 * numbers[0]["kl"]
    assert numbers[-1]["loss"] < numbers[0]["loss"]
    assert numbers[-1]["top1_agreement"] > 0.5 > numbers[0]["top1_agreement"]


@pytest.mark.slow
def test_hugging_face_trainer():
    """In the environment that holds transformers and peft, with a pytest of its own."""
    checks = Path(__file__).with_name("trainer_checks.py")
    print(run(exports_python(), "-m", "pytest", checks, "-q", "-p", "no:cacheprovider"))


@pytest.mark.slow
def test_stock_recipe_script(tmp_path):
    """torchtune's recipe with the script's two overrides, on models that fit a test."""
    cfg = make_config(tmp_path, "lora", rows=ROWS[4:8] * 3, optimizer__lr=1e-2)
    more = {
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "resume_from_checkpoint": False,
        "max_steps_per_epoch": 3,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "enable_activation_checkpointing": False,
    }
    del cfg.kd_loss
    cfg.kd_ratio = 1.0
    OmegaConf.save(OmegaConf.merge(cfg, more), tmp_path / "tiny.yaml")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(EXAMPLES / "stock_torchtune_recipe.sh", "seed=11", CONFIG=str(tmp_path / "tiny.yaml"), PATH=path)
    values = [step["kd_loss"] for step in read_log(cfg.output_dir)]
    assert values[0] == values[1] > values[2] > 0  # the first step of the warm-up has rate 0
