"""A run that is resumed with other teachers: refused by name, or gone on with where that is asked for."""

import copy

import pytest
import torch
from omegaconf import OmegaConf

from helpers.cached import write
from helpers.resumable import killed_run, resumable_config, resumed
from helpers.teacher_kinds import NO_LIVE, narrow_teacher, wide_teacher
from helpers.tiny import read_log, run_in_process
from torchtune_kd.errors import UserError
from torchtune_kd.storage.manifest import Manifest


def config(folder, teachers, **more):
    cfg = resumable_config(folder, epochs=1, save_every_n_steps=2, run_val_every_n_steps=None, **more)
    return OmegaConf.merge(cfg, NO_LIVE, {"teachers": teachers})


def two(folder):
    resumable_config(folder)  # writes the files of teacher and student
    return [
        {"name": "wide", "share": 0.5, **wide_teacher(folder)},
        {"name": "narrow", "share": 0.5, **narrow_teacher(folder)},
    ]


def another_share(teachers, folder):
    teachers[0]["share"], teachers[1]["share"] = 0.7, 0.3


def another_order(teachers, folder):
    teachers.reverse()


def another_member(teachers, folder):
    teachers[1] |= wide_teacher(folder)


def one_less(teachers, folder):
    del teachers[1]
    teachers[0]["share"] = 1.0


def one_from_a_cache(teachers, folder):
    cfg = resumable_config(folder)
    write(cfg, folder / "cache", dtype="bf16")
    teachers[0] = {"name": "wide", "share": 0.5, "cache": str(folder / "cache")}


def one_in_8_bits(teachers, folder):
    teachers[0]["weights"] = "int8"


CHANGES = {
    another_share: r"`teachers\[0\]\.share` \(0\.5 then, 0\.7 now\)",
    another_order: r"`teachers\[0\]\.name` \(wide then, narrow now\)",
    another_member: r"num_layers 'narrow' \(1 then, 2 now\).*; weights of the teacher 'narrow' \(\w+ then, \w+ now\)",
    one_less: r"`teachers\[1\]\.share` \(0\.5 then, none now\)",
    one_from_a_cache: r"signal of the teacher 'wide' \(none then, hidden states in bf16 from a cache",
    one_in_8_bits: r"teacher_weights 'wide' \(none then, int8 now\)",
}


@pytest.mark.parametrize(
    "change",
    [
        each
        if each in (another_order, another_member, one_from_a_cache)
        else pytest.param(each, marks=pytest.mark.slow)
        for each in CHANGES
    ],
)
def test_other_teachers_are_refused_by_name_or_gone_on_with(tmp_path, change, capsys):
    teachers = two(tmp_path)
    killed_run(config(tmp_path, teachers), 2)
    before = Manifest.read(tmp_path / "out" / "step_2")
    teachers = copy.deepcopy(teachers)
    change(teachers, tmp_path)
    again = config(tmp_path, teachers, resume_from_checkpoint=True)
    with pytest.raises(UserError, match=CHANGES[change]) as refused:
        run_in_process(again)
    assert "`resume_despite_changes: True`" in str(refused.value) and "\n" not in str(refused.value)
    assert Manifest.read(tmp_path / "out" / "step_2") == before
    again.resume_despite_changes = True
    run_in_process(again)
    assert "warning: the run goes on although settings changed" in capsys.readouterr().err
    assert [line["step"] for line in read_log(again.output_dir) if "lr" in line] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_without_an_average_is_refused_or_begins_one(tmp_path, capsys):
    """And says so: the average would otherwise seem to be that of all steps."""
    resumable_config(tmp_path)
    killed_run(config(tmp_path, [wide_teacher(tmp_path)]), 2)
    again = config(tmp_path, [{"self": "ema", "decay": 0.9}], resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"`teachers\[0\]\.self` \(none then, ema now\)"):
        run_in_process(again)
    capsys.readouterr()
    again.resume_despite_changes = True
    seen = {}

    def begin(run):
        if not seen:
            kept, weights = run.teacher.kept_state(), dict(run.student.decoder.named_parameters())
            seen.update({name: torch.equal(kept[f"average.{name}"], weight) for name, weight in weights.items()})

    run = run_in_process(again, {"step": begin})
    said = (
        f"warning: the checkpoint {tmp_path}/out/step_2 holds no average of the student's weights, since its run kept "
        "none: the teacher begins as the student of that step."
    )
    assert capsys.readouterr().err.count(said) == 1
    assert seen and all(seen.values()) and int(run.teacher.kept_state()["steps"]) == 4


def test_a_checkpoint_with_an_average_serves_a_run_without_one(tmp_path):
    resumable_config(tmp_path)
    killed_run(config(tmp_path, [{"self": "ema", "decay": 0.9}]), 2)
    again = config(tmp_path, [wide_teacher(tmp_path)], resume_from_checkpoint=True, resume_despite_changes=True)
    assert not run_in_process(again).teacher.kept_state()


@pytest.mark.slow
def test_a_save_that_fails_takes_the_average_of_no_other_step(tmp_path, monkeypatch):
    """The disk is full at step 4: the run that is resumed has the average of step 2, and catches up."""
    expected = config(tmp_path, [{"self": "ema", "decay": 0.8}], output_dir=str(tmp_path / "expected"))
    run_in_process(expected)
    cfg = config(tmp_path, [{"self": "ema", "decay": 0.8}])
    write_manifest = Manifest.write

    def fail(self, folder):
        if self.progress["global_step"] == 4:
            raise OSError(28, "No space left on device")
        write_manifest(self, folder)

    monkeypatch.setattr(Manifest, "write", fail)

    killed_run(cfg, 5)
    assert not (tmp_path / "out" / "step_4").exists()
    monkeypatch.undo()
    run = run_in_process(resumed(cfg))
    assert int(run.teacher.kept_state()["steps"]) == 6
    ours, theirs = (read_log(each.output_dir) for each in (cfg, expected))
    assert [line["loss"] for line in ours if "loss" in line] == [line["loss"] for line in theirs if "loss" in line]
