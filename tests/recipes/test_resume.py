"""A run that is killed and resumed gives the numbers of one that was not: bit for bit, whatever was in the way."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny import dataset_section, make_config, read_log, run_in_process

import torchtune_kd.training.run as run_module

CLOCK = "tokens_per_second_per_gpu"  # all that may differ


class Killed(BaseException):
    """Stands for SIGKILL where a test wants the moment exactly; test_kill.py sends the real one."""


def config(folder, kind="full", **overrides):
    """Two epochs of 6 steps; validation every 4 steps, a checkpoint every 2; shuffled, with dropout."""
    base = {
        "epochs": 2,
        "shuffle": True,
        "save_every_n_steps": 2,
        "run_val_every_n_steps": 4,
        "clip_grad_norm": 1.0,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 3,
        },
    }
    cfg = make_config(folder, kind, **(base | overrides))
    cfg.dataset_val = dataset_section(folder / "rows.jsonl")
    if kind != "full":
        cfg.model.lora_dropout = 0.1
    return cfg


def log_of(cfg):
    return [{k: v for k, v in line.items() if k != CLOCK} for line in read_log(cfg.output_dir)]


def weights_of(cfg, epoch=1):
    (shard,) = (Path(cfg.output_dir) / f"epoch_{epoch}").glob("model-*.safetensors")
    return load_file(shard)


def assert_same_run(cfg, expected):
    assert log_of(cfg) == log_of(expected)
    ours, theirs = weights_of(cfg), weights_of(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def kill_after_step(monkeypatch, step):
    """The process is gone once this step's update, validation and checkpoint are done."""
    original = run_module.checkpoint_if_due

    def checkpoint_then_die(run):
        original(run)
        if run.progress.global_step == step:
            raise Killed

    monkeypatch.setattr("torchtune_kd.training.checkpoint_if_due", checkpoint_then_die)


def killed_run(cfg, monkeypatch, step):
    with monkeypatch.context() as patch:
        kill_after_step(patch, step)
        with pytest.raises(Killed):
            run_in_process(cfg)


def resume(cfg, **overrides):
    again = OmegaConf.merge(cfg, {"resume_from_checkpoint": True}, overrides)
    run_in_process(again)
    return again


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, monkeypatch, kind):
    """Killed right after a checkpoint, between two, at a validation, and at the end of an epoch."""
    undisturbed = config(tmp_path, kind, output_dir=str(tmp_path / "undisturbed"))
    run_in_process(undisturbed)
    cfg = config(tmp_path, kind, output_dir=str(tmp_path / "killed"))
    killed_run(cfg, monkeypatch, 3)
    for step in (4, 6, 9):
        killed_run(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), monkeypatch, step)
    resume(cfg)
    assert_same_run(cfg, undisturbed)
