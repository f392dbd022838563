"""A run that is resumed with something changed: what is refused and by which name, and what counts from then on."""

import re
import shutil

import pytest
from omegaconf import OmegaConf

from helpers.resumable import killed_run, resume
from helpers.resumable import resumable_config as config
from helpers.tiny import ROWS, TEACHER, model_section, read_log, run_in_process, write_checkpoint, write_rows
from torchtune_kd.training import UserError


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


CHANGES = {
    "teacher swapped": (lambda cfg, folder: swap_teacher(folder), r"weights of the teacher \(\w+ then, \w+ now\)"),
    "tokenizer": (lambda cfg, folder: swap_tokenizer(folder), r"files of the tokenizer \(\w+ then, \w+ now\)"),
    "data": (lambda cfg, folder: write_rows(folder / "rows.jsonl", [*ROWS[:-1], "other"]), "content of the dataset"),
    "loss": (
        lambda cfg, folder: OmegaConf.update(cfg, "kd_loss.temperature", 1.0),
        r"`kd_loss.temperature` \(2.0 then, 1.0 now\)",
    ),
    "weight of the loss": (
        lambda cfg, folder: OmegaConf.update(cfg, "kd_ratio", 0.25),
        r"`kd_ratio` \(0.5 then, 0.25 now\)",
    ),
    "teacher's head": (
        lambda cfg, folder: OmegaConf.update(cfg, "teacher_head", "float8"),
        r"`teacher_head` \(none then, float8 now\)",
    ),
    "batch": (lambda cfg, folder: OmegaConf.update(cfg, "batch_size", 3), r"sequences per step.* \(4 then, 3 now\)"),
}


def swap_teacher(folder):
    shutil.rmtree(folder / "teacher")
    write_checkpoint(folder / "teacher", model_section("full", TEACHER, tied=False), seed=9)


def swap_tokenizer(folder):
    path = folder / "student" / "tokenizer.json"
    path.write_text(path.read_text().replace('"normalized": false', '"normalized": true'))


@pytest.mark.parametrize("change", [name if name in ("teacher swapped", "loss") else slow(name) for name in CHANGES])
def test_another_teacher_tokenizer_dataset_or_loss_is_refused_by_name(tmp_path, capsys, change):
    cfg = config(tmp_path, epochs=1)
    killed_run(cfg, 2)
    apply, said = CHANGES[change]
    apply(cfg, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "step_2").iterdir()}
    with pytest.raises(UserError) as refused:
        resume(cfg)
    message = str(refused.value)
    assert re.search(said, message) and "`resume_despite_changes: True`" in message, message
    assert all(path.read_bytes() == content for path, content in before.items())
    resume(cfg, resume_despite_changes=True)
    assert "the run goes on although settings changed" in capsys.readouterr().err
    steps = [line["step"] for line in read_log(cfg.output_dir) if "loss" in line]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] >= 6


@pytest.mark.slow
def test_another_student_is_refused_for_good(tmp_path):
    cfg = config(tmp_path, "lora")
    killed_run(cfg, 2)
    cfg.model.lora_rank = 8
    with pytest.raises(UserError, match=r"holds another student: `model.lora_rank` \(4 then, 8 now\)"):
        resume(cfg, resume_despite_changes=True)


@pytest.mark.slow
def test_a_moved_folder_is_the_same_run(tmp_path):
    """Files count by their content: the job may be restarted where the disk has another name."""
    cfg = config(tmp_path / "here", epochs=1)
    killed_run(cfg, 4)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = OmegaConf.create(OmegaConf.to_yaml(cfg).replace(f"{tmp_path}/here", f"{tmp_path}/there"))
    resume(moved)
    assert [line["step"] for line in read_log(moved.output_dir) if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"optimizer.lr": 1e-4}, {"epochs": 3}])
def test_new_options_count_where_they_are_allowed(tmp_path, options):
    """Learning rates after resuming are those of a run that had the new options from the start."""
    cfg = config(tmp_path)
    killed_run(cfg, 4)
    for key, value in options.items():
        OmegaConf.update(cfg, key, value)
    fresh = OmegaConf.merge(cfg, {"output_dir": str(tmp_path / "fresh")})
    run_in_process(fresh)
    resume(cfg, resume_despite_changes=True)
    rates = [[line["lr"] for line in read_log(c.output_dir) if "lr" in line] for c in (cfg, fresh)]
    assert rates[0][4:] == pytest.approx(rates[1][4:], rel=1e-12) and len(rates[0]) == len(rates[1])
