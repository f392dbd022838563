"""Epochs that end before the first checkpoint is due."""

import pytest

from helpers.forked import ForkedRun
from helpers.resumable import assert_same_run, resumable_config
from helpers.tiny import run_in_process
from torchtune_kd.checkpoints.folders import step_folders


@pytest.mark.slow
def test_a_run_killed_after_its_first_epoch_goes_on_by_the_same_command(tmp_path):
    cfg = resumable_config(
        tmp_path, output_dir=str(tmp_path / "killed"), save_every_n_steps=50, resume_from_checkpoint=True
    )
    run = ForkedRun(cfg)
    assert run.wait_for("step", 8)
    run.kill()
    assert (tmp_path / "killed" / "epoch_0").is_dir()
    assert [folder.name for folder in step_folders(tmp_path / "killed")] == ["step_6"]
    assert "Going on with" in ForkedRun(cfg).finish()
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"), save_every_n_steps=None)
    run_in_process(undisturbed)
    assert_same_run(cfg, undisturbed)
