"""What the tests of resumed runs share: a run with everything in it, and what must be equal afterwards."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from helpers.tiny import dataset_section, make_config, read_log, run_in_process
from torchtune_kd.storage.manifest import Manifest

CLOCK = {"tokens_per_second_per_gpu", "teacher_time_share"}  # all that may differ


def resumable_config(folder, kind="full", **overrides):
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
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_log(cfg.output_dir)]


def weights_of(cfg, epoch=1):
    (shard,) = (Path(cfg.output_dir) / f"epoch_{epoch}").glob("model-*.safetensors")
    return load_file(shard)


def assert_same_run(cfg, expected):
    assert log_of(cfg) == log_of(expected), cfg.output_dir
    ours, theirs = weights_of(cfg), weights_of(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def is_whole(folder) -> bool:
    """Compare all files of a checkpoint with its manifest."""
    manifest = Manifest.read(folder)
    manifest.check_files(folder, manifest.files)
    return True


class Killed(BaseException):
    """Stands for SIGKILL where a test wants the moment exactly; test_kill.py sends the real one."""


def at_steps(actions):
    """Call ``actions[n]`` once step n is done and its checkpoint is written."""
    return {"between steps": lambda run: actions.get(run.progress.global_step, lambda: None)()}


def killed_run(cfg, step, actions=None):
    """Run ``cfg`` until the update, validation and checkpoint of this step are done, and no further."""

    def die():
        raise Killed

    with pytest.raises(Killed):
        run_in_process(cfg, on=at_steps({**(actions or {}), step: die}))


def resumed(cfg, **overrides):
    """Return the config with which a run goes on from its last checkpoint, with other options if need be."""
    return OmegaConf.merge(cfg, {"resume_from_checkpoint": True}, overrides)


def resume(cfg, **overrides):
    """Go on with a run to its end in this process; return its config."""
    again = resumed(cfg, **overrides)
    run_in_process(again)
    return again


def interrupted_and_resumed(cfg, step=7):
    """Run ``cfg`` in this process, interrupted at the beginning of a step, then to its end from the last checkpoint."""

    def stop(run):
        if run.global_step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(cfg, {"step": stop})
    cfg.resume_from_checkpoint = True
    run_in_process(cfg)
