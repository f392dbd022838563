"""Runs with `teacher_head: float8`: finite numbers near those of the head as it is, the same on every topology."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from helpers.forked import ForkedRun
from helpers.resumable import assert_same_run, resumable_config
from helpers.tiny import TEACHER, make_config, model_section, read_log, run_in_process, write_checkpoint
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.training import UserError

NAMES = ("loss", "class_loss", "kd_loss", "kl", "grad_norm", "teacher_entropy", "top1_agreement", "lr")


def tied_teacher(folder):
    """A teacher whose head is its embedding, small enough for more than one id to count."""
    section = model_section("full", TEACHER)
    path = write_checkpoint(folder, section, seed=1) / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"] *= 0.1
    save_file(weights, path)
    return {"teacher_model": section, "teacher_checkpointer__checkpoint_dir": str(folder)}


def steps_of(cfg):
    return [step for step in read_log(cfg.output_dir) if "loss" in step]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_losses_are_finite_and_near_those_of_the_head_as_it_is(tmp_path, capsys, tied, dtype):
    sections = {"max_steps_per_epoch": 4, "dtype": dtype}
    if tied:
        sections |= tied_teacher(tmp_path / "tied")
    found = []
    for head in (None, "float8"):
        cfg = make_config(tmp_path, output_dir=str(tmp_path / str(head)), **sections)
        if head is not None:
            cfg.teacher_head = head
        run = run_in_process(cfg)
        said = capsys.readouterr().err.count("The teacher's head is in 8-bit floats")
        assert said == (head is not None)
        assert (run.teacher.teacher.head is None) == (head is None)
        found.append(steps_of(cfg))
    assert len(found[0]) == len(found[1]) == 4
    for plain, float8 in zip(*found, strict=True):
        assert all(math.isfinite(float8[name]) for name in NAMES)
        assert float8["kd_loss"] == pytest.approx(plain["kd_loss"], rel=0.05)
        assert float8["kl"] != plain["kl"]
    assert found[1][0]["class_loss"] == found[0][0]["class_loss"]  # the student is the same, before its first update


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    undisturbed, cfg = (
        OmegaConf.merge(resumable_config(tmp_path, output_dir=str(tmp_path / name)), {"teacher_head": "float8"})
        for name in ("undisturbed", "killed")
    )
    run_in_process(undisturbed)

    def die(run):
        if run.progress.global_step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(cfg, on={"between steps": die})
    again = OmegaConf.merge(cfg, {"resume_from_checkpoint": True})
    run_in_process(again)
    assert_same_run(again, undisturbed)
    for head in (None, "float9"):
        with pytest.raises(UserError, match="teacher_head"):
            run_in_process(OmegaConf.merge(again, {"teacher_head": head}))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["own head", "tied"])
def test_two_processes_give_the_numbers_of_one(tmp_path, tied):
    """Each holds the whole head; the rest of the teacher is sharded."""
    sections = {"max_steps_per_epoch": 4}
    if tied:
        sections |= tied_teacher(tmp_path / "tied")
    one = make_config(tmp_path, output_dir=str(tmp_path / "one"), batch_size=4, **sections)
    two = make_config(tmp_path, output_dir=str(tmp_path / "two"), batch_size=2, **sections)
    one.teacher_head = two.teacher_head = "float8"
    run_in_process(one)
    forked = ForkedRun(two, 2)
    forked.finish()
    for step, other in zip(steps_of(two), steps_of(one), strict=True):
        for name in NAMES:
            assert step[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_width_that_cannot_be_is_said_before_weights_are_read(tmp_path):
    cfg = make_config(tmp_path)
    cfg.teacher_head = "float8"
    cfg.teacher_model = model_section("full", TEACHER | {"embed_dim": 24}, tied=False)
    recipe = KDRecipe(cfg)
    with pytest.raises(UserError, match=r"`teacher_head: float8` does not fit `teacher_model`: .* multiple of 16.* 24"):
        recipe.setup()


def test_without_a_teacher_there_is_no_head(tmp_path):
    cfg = make_config(tmp_path, kd_ratio=0.0, max_steps_per_epoch=1)
    cfg.teacher_head = "float8"
    run_in_process(cfg)
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in steps_of(cfg))
