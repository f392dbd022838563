"""A sweep over the tiny models."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from helpers.tiny import dataset_section, make_config


def evaluation(folder: Path) -> dict[str, Any]:
    """Return what is measured of each run: text, and a file of two questions."""
    return {"tasks": ["heldout", str(folder / "questions.jsonl")], "latency": None}


def sweep_config(folder: Path, **keys: Any) -> DictConfig:
    """2 losses x 2 temperatures x 2 seeds of 3 steps each; what :func:`evaluation` gives evaluates them."""
    if not (folder / "base.yaml").exists():
        base = make_config(folder)
        base.data_dir = str(folder)
        base.dataset_val = dataset_section("${data_dir}/rows.jsonl")
        OmegaConf.save(base, folder / "base.yaml")
        questions = [
            '{"context": "the quick brown", "choices": ["fox", "dog"], "answer": 0}',
            '{"context": "over the lazy", "choices": ["fox", "dog"], "answer": 1}',
        ]
        (folder / "questions.jsonl").write_text("\n".join(questions) + "\n")
    losses = {"FKL": "torchtune_kd.losses.ForwardKLLoss", "RKL": "torchtune_kd.losses.ReverseKLLoss"}
    written = {
        "output_dir": str(folder / "sweep"),
        "run_config": str(folder / "base.yaml"),
        "overrides": {"max_steps_per_epoch": 3},
        "grid": {"kd_loss._component_": losses, "kd_loss.temperature": [1, 2]},
        "seeds": [0, 1],
    }
    return OmegaConf.create(written | keys)
