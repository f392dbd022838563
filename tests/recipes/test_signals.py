"""A run ends well by a signal, and by the end of one of its processes: a checkpoint, an exit code, a sentence."""

import signal
import time

import pytest
from omegaconf import OmegaConf

from helpers.forked import ForkedRun
from helpers.resumable import assert_same_run, is_whole, resumable_config
from helpers.tiny import run_in_process
from torchtune_kd.checkpoints.folders import step_folders
from torchtune_kd.storage.manifest import Manifest

# --- signals


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_with_a_checkpoint_and_its_own_exit_code(tmp_path, name):
    cfg = resumable_config(tmp_path, output_dir=str(tmp_path / "stopped"), save_every_n_steps=None)
    run = ForkedRun(cfg)
    assert run.wait_for("step", 3)
    run.send(getattr(signal, name))
    assert run.join() == [75]
    (folder,) = step_folders(tmp_path / "stopped")
    step = int(folder.name.removeprefix("step_"))
    assert 3 <= step <= 5 and is_whole(folder)
    said = f"stopped: {name} ended the run after step {step}; its checkpoint is {folder}: go on with"
    assert said in run.output()
    if name == "SIGTERM":
        ForkedRun(OmegaConf.merge(cfg, {"resume_from_checkpoint": True})).finish()
        undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"))
        run_in_process(undisturbed)
        assert_same_run(cfg, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "more"), [(1, {}), (2, {}), (2, {"fsdp_reshard_after_forward": False})])
def test_a_signal_within_a_step_waits_for_the_microbatch_only(tmp_path, size, more):
    """The step is given up and done anew: its dropout, its data, which are random here, and the reduced gradients."""
    split = {"batch_size": 1, "gradient_accumulation_steps": 4 // size, "save_every_n_steps": None}
    split |= {"dataset___component_": "helpers.tiny.noisy_dataset", **more}
    cfg = resumable_config(tmp_path, "lora", output_dir=str(tmp_path / "stopped"), **split)
    run = ForkedRun(cfg, size, hold=("microbatch", 2 * 4 // size + 1))  # the first of step 3
    assert run.wait_for("microbatch", 2 * 4 // size + 1)
    run.send(signal.SIGTERM, ranks=[0])
    time.sleep(0.2)
    run.wake()
    assert run.join() == [75] * size
    assert "SIGTERM ended the run after step 2; its checkpoint is" in run.output()
    (folder,) = step_folders(tmp_path / "stopped")
    assert folder.name == "step_2" and is_whole(folder)
    ForkedRun(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), size).finish()
    undisturbed = resumable_config(tmp_path, "lora", output_dir=str(tmp_path / "undisturbed"), **split)
    ForkedRun(undisturbed, size).finish()
    assert_same_run(cfg, undisturbed)


@pytest.mark.slow
def test_a_signal_in_a_validation_leaves_it_for_the_resumed_run(tmp_path):
    cfg = resumable_config(tmp_path, output_dir=str(tmp_path / "stopped"), save_every_n_steps=None)
    run = ForkedRun(cfg, hold=("validation", 2))
    assert run.wait_for("validation", 2)
    run.send(signal.SIGTERM)
    time.sleep(0.2)
    run.wake()
    assert run.join() == [75]
    assert step_folders(tmp_path / "stopped")[0].name == "step_4"
    run_in_process(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}))
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"))
    run_in_process(undisturbed)
    assert_same_run(cfg, undisturbed)


@pytest.mark.slow
def test_two_processes_agree_on_the_step_when_one_is_signalled(tmp_path):
    cfg = resumable_config(tmp_path, output_dir=str(tmp_path / "stopped"), batch_size=2)
    run = ForkedRun(cfg, 2)
    assert run.wait_for("step", 3)
    run.send(signal.SIGTERM, ranks=[1])
    assert run.join() == [75, 75]
    newest = step_folders(tmp_path / "stopped")[0]
    assert is_whole(newest) and Manifest.read(newest).processes == 2
    for rank in (0, 1):
        assert f"its checkpoint is {newest}" in run.output(rank)
    ForkedRun(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), 2).finish()
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"), batch_size=2)
    ForkedRun(undisturbed, 2).finish()
    assert_same_run(cfg, undisturbed)


@pytest.mark.slow
def test_a_second_sigterm_ends_it_at_once_and_the_last_checkpoint_is_whole(tmp_path):
    """In the middle of a save that hangs; two signals in the same second are one request (torchrun passes them on)."""
    cfg = resumable_config(tmp_path, output_dir=str(tmp_path / "stopped"))
    run = ForkedRun(cfg, hold=("rename", 2))
    assert run.wait_for("rename", 2)
    run.send(signal.SIGTERM)
    time.sleep(0.1)
    run.send(signal.SIGTERM)
    time.sleep(1.5)
    assert run.processes[0].exitcode is None
    run.send(signal.SIGTERM)
    asked = time.monotonic()
    assert run.join() == [143]
    assert time.monotonic() - asked < 5
    assert [folder.name for folder in step_folders(tmp_path / "stopped")] == ["step_2"]
    assert is_whole(tmp_path / "stopped" / "step_2")
    ForkedRun(OmegaConf.merge(cfg, {"resume_from_checkpoint": True})).finish()
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"))
    run_in_process(undisturbed)
    assert_same_run(cfg, undisturbed)


# --- a process that dies


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_process_dies_or_hangs_the_other_ends_within_a_minute(tmp_path, number):
    cfg = resumable_config(tmp_path, batch_size=2, process_group_timeout=5)
    run = ForkedRun(cfg, 2)
    assert run.wait_for("step", 4)
    run.send(number, ranks=[1])
    start = time.monotonic()
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 3, run.output()
    assert time.monotonic() - start < 60
    assert "error: Another process of the run is gone, or this one waited for it" in run.output()
    assert "Traceback" not in run.output()
    run.kill()
    assert all(is_whole(folder) for folder in step_folders(tmp_path / "out"))
