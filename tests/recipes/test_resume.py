"""A run that is killed and resumed gives the numbers of one that was not: bit for bit, whatever was in the way."""

import hashlib
import itertools
import json
import re
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from helpers.forked import ForkedRun
from helpers.resumable import Killed, assert_same_run, killed_run, log_of, resume, weights_of
from helpers.resumable import resumable_config as config
from helpers.tiny import (
    read_log,
    run_in_process,
)
from torchtune_kd.checkpoints.folders import step_folders
from torchtune_kd.storage.manifest import Manifest
from torchtune_kd.training import UserError

MASTER = "torchtune_kd.training.master_adamw.MasterAdamW"


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def die_at(number):
    """Die at the event of this number (from 1)."""
    numbers = itertools.count(1)

    def die(run):
        if next(numbers) == number:
            raise Killed

    return die


# (student, optimizer): LoRA has dropout; what an optimizer keeps is its own affair, in types and shapes
STUDENTS = {
    "full": ("full", None, "fp32"),
    "lora": ("lora", None, "fp32"),
    "qdora": ("qdora", None, "bf16"),
    "momentum": ("full", {"_component_": "torch.optim.SGD", "lr": 1e-5, "momentum": 0.9}, "fp32"),
    "master weights": ("full", {"_component_": MASTER, "lr": 1e-3}, "bf16"),
    "master weights in fp32": ("full", {"_component_": MASTER, "lr": 1e-3}, "fp32"),
    "8 bit": ("full", {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}, "bf16"),
}


@pytest.mark.parametrize("student", [name if name == "lora" else slow(name) for name in STUDENTS])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, monkeypatch, student):
    """Killed right after a checkpoint, between two, at a validation, and at the end of an epoch."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles its optimizer, for minutes
    kind, optimizer, dtype = STUDENTS[student]
    undisturbed = config(tmp_path, kind, output_dir=str(tmp_path / "undisturbed"), dtype=dtype)
    cfg = config(tmp_path, kind, output_dir=str(tmp_path / "killed"), dtype=dtype)
    if optimizer is not None:
        undisturbed.optimizer, cfg.optimizer = optimizer, optimizer
    run_in_process(undisturbed)
    killed_run(cfg, 3)
    for step in (4, 6, 9):
        killed_run(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), step)
    resume(cfg)
    assert_same_run(cfg, undisturbed)


# place: the event, and the how many-th of it
PLACES = {
    "writing": ("manifest", 3),  # shards are there, the manifest is not
    "before renaming": ("rename", 3),
    "validation": ("validation", 3),
    "step": ("gradients", 6),
    "export": ("export", 2),
}


@pytest.mark.parametrize("place", ["before renaming", *map(slow, ("writing", "validation", "step", "export"))])
def test_killed_in_the_middle_of_anything(tmp_path, place):
    undisturbed = config(tmp_path, output_dir=str(tmp_path / "undisturbed"))
    run_in_process(undisturbed)
    cfg = config(tmp_path, output_dir=str(tmp_path / "killed"))

    event, number = PLACES[place]
    with pytest.raises(Killed):
        run_in_process(cfg, on={event: die_at(number)})
    resume(cfg)
    assert_same_run(cfg, undisturbed)
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert {name for name in names if "." in name} == {"torchtune_config.yaml"}  # nothing half done is left


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    """Validation every 2 steps, checkpoints every 3: the best is written when it is found, whatever the step."""
    cfg = config(tmp_path, save_every_n_steps=3, keep_last_n=1, keep_best="val_top1_agreement", run_val_every_n_steps=2)
    cfg.lr_scheduler = None
    cfg.optimizer.lr = 0.0  # every validation is as good as the first: the first one stays
    run_in_process(cfg)
    assert {folder.name for folder in step_folders(tmp_path / "out")} == {"step_12", "step_2"}
    assert Manifest.read(tmp_path / "out" / "step_2").validation["val_kl"] > 0


@pytest.mark.slow
def test_checkpoints_written_in_the_background_are_the_same(tmp_path):
    undisturbed = config(tmp_path, output_dir=str(tmp_path / "undisturbed"))
    run_in_process(undisturbed)
    cfg = config(tmp_path, output_dir=str(tmp_path / "killed"), enable_async_checkpointing=True)
    run = ForkedRun(cfg)
    assert run.wait_for("step", 8)
    run.kill()
    run_in_process(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}))
    assert_same_run(cfg, undisturbed)


def test_without_a_checkpoint_it_starts_from_the_beginning_and_says_so(tmp_path, capsys):
    cfg = config(tmp_path, resume_from_checkpoint=True, epochs=1, save_every_n_steps=6)
    killed_run(cfg, 3)
    run_in_process(cfg)
    assert f"There is no checkpoint in {tmp_path}/out yet" in capsys.readouterr().err
    assert [line["step"] for line in read_log(cfg.output_dir) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_complete_run_is_left_alone(tmp_path, capsys):
    cfg = config(tmp_path, epochs=1)
    run_in_process(cfg)
    before, log = weights_of(cfg, 0), log_of(cfg)
    resume(cfg)
    assert "The run is complete" in capsys.readouterr().err
    assert log_of(cfg) == log
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(cfg, 0).items())


def test_a_run_that_is_not_resumed_is_not_written_over(tmp_path):
    cfg = config(tmp_path)
    killed_run(cfg, 4)
    with pytest.raises(UserError, match=r"already holds a run \(step_2, step_4\): set `resume_from_checkpoint: True`"):
        run_in_process(cfg)
    cfg.overwrite_output_dir, cfg.epochs = True, 1
    run_in_process(cfg)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {
        "epoch_0", "logs", "step_4", "step_6"
    }  # fmt: skip


DAMAGE = {
    "a truncated shard": ("__0_0.distcp", lambda content: content[:-100], r"has \d+ bytes instead of \d+"),
    "a flipped byte": (
        "__0_0.distcp",
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        "the content of __0_0.distcp has changed",
    ),
    "a manifest that is no JSON": ("manifest.json", lambda content: content[: len(content) // 2], "cannot be read"),
    "a manifest that was changed": (
        "manifest.json",
        lambda content: content.replace(b'"global_step": 6', b'"global_step": 7'),
        "is not as it was written",
    ),
    "a shard that is gone": ("__0_0.distcp", None, "the file __0_0.distcp is missing"),
}


FAST_DAMAGE = ("a flipped byte", "a manifest that is no JSON")


@pytest.mark.parametrize("damage", [name if name in FAST_DAMAGE else slow(name) for name in DAMAGE])
def test_a_damaged_checkpoint_is_stepped_over(tmp_path, capsys, damage):
    cfg = config(tmp_path)
    killed_run(cfg, 6)
    run = make_copy(cfg, tmp_path / "undisturbed")
    resume(run)
    file, change, said = DAMAGE[damage]
    path = tmp_path / "out" / "step_6" / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    capsys.readouterr()
    resume(cfg)
    message = capsys.readouterr().err
    assert re.search(rf"warning: the checkpoint {tmp_path}/out/step_6 is damaged \(.*{said}", message), message
    assert f"Going on with {tmp_path}/out/step_4: step 4" in message
    assert_same_run(cfg, run)
    assert (tmp_path / "out" / "step_6.damaged").is_dir()  # kept for whoever wants to look


@pytest.mark.slow
def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    cfg = config(tmp_path, keep_last_n=1)
    killed_run(cfg, 2)
    (tmp_path / "out" / "step_2" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"Every checkpoint in .*/out is damaged \(step_2\)"):
        resume(cfg)
    assert (tmp_path / "out" / "step_2").is_dir()


def make_copy(cfg, folder):
    """The same run in another folder, with all that it has written."""
    shutil.copytree(cfg.output_dir, folder)
    return OmegaConf.merge(cfg, {"output_dir": str(folder)})


@pytest.mark.slow
@pytest.mark.parametrize("filename", ["ABSOLUTE", "runs/log.txt", None])
def test_the_log_goes_on_where_it_was(tmp_path, filename):
    """An absolute name, one with a folder, and one that the logger makes of the time."""
    if filename == "ABSOLUTE":
        filename = str(tmp_path / "log.txt")
    cfg = config(tmp_path, epochs=1, metric_logger__filename=filename)
    (tmp_path / "out" / "logs" / "runs").mkdir(parents=True)
    killed_run(cfg, step=3)
    resume(cfg)
    (log,) = tmp_path.glob("**/log*.txt")
    assert filename is None or log == tmp_path / "out" / "logs" / filename
    steps = [int(step) for step in re.findall(r"^Step (\d+) \| loss:", log.read_text(), re.MULTILINE)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_seed_drawn_at_random_is_kept(tmp_path):
    cfg = config(tmp_path, seed=None, epochs=1)
    killed_run(cfg, 2)
    seed = Manifest.read(tmp_path / "out" / "step_2").seed
    resume(cfg)
    assert Manifest.read(tmp_path / "out" / "step_6").seed == seed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("val_loss", None),
        ("loss", "one of val_loss, val_class_loss, val_kd_loss, val_kl"),
        ("val_student_entropy", "one of"),
    ],
)
def test_keep_best_names_a_metric_that_has_a_better_end(tmp_path, name, said):
    cfg = config(tmp_path, epochs=1, max_steps_per_epoch=1, keep_best=name)
    if said is None:
        run_in_process(cfg)
    else:
        with pytest.raises(UserError, match=said):
            run_in_process(cfg)


def test_the_manifest_says_what_the_checkpoint_is(tmp_path):
    cfg = config(tmp_path, "lora")
    killed_run(cfg, 8)
    content = json.loads((tmp_path / "out" / "step_8" / "manifest.json").read_text())
    assert content["progress"]["global_step"] == 8 and content["progress"]["epoch"] == 1
    assert content["progress"]["samples"] == 8  # 2 steps of 4 rows into the second epoch
    assert content["progress"]["tokens"] > 0
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert content["config"]["kd_loss"]["temperature"] == 2.0
    assert content["validation"]["val_loss"] > 0
    for name, facts in content["files"].items():
        written = (tmp_path / "out" / "step_8" / name).read_bytes()
        assert facts == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
