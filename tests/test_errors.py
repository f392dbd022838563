"""The end of a run: its sentence comes before its cleaning up, and no cleaning up changes the exit code."""

import sys
import time

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

import torchtune_kd.training as kd
from helpers.forked import ForkedRun
from helpers.tiny import make_config, run_in_process
from torchtune_kd.models import build
from torchtune_kd.recipes import kd as recipe
from torchtune_kd.teachers import live
from torchtune_kd.training import RunError, Stopped, UserError, exit_with_message, report_errors


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("No such file."), 2, "error: No such file.\n"),
        (RunError("No memory."), 3, "error: No memory.\n"),
        (Stopped("SIGTERM ended the run."), 75, "stopped: SIGTERM ended the run.\n"),
        (KeyboardInterrupt(), 130, "stopped: SIGINT came while nothing was being trained"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "error: The memory of a device ran out outside of"),
        (dist.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), 3, "error: The memory of a device ran"),
        (dist.DistBackendError("NCCL error: remote process exited"), 3, "error: Another process of the run is gone"),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/pair.cc:1] closed"), 3, "error: Another process of the run"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_the_sentence_comes_before_cleaning_up_and_stays_if_that_fails(capsys, error, code, said):
    seen = []

    @exit_with_message()
    def main():
        with report_errors() as cleanup:
            cleanup.callback(lambda: 1 / 0)
            cleanup.callback(lambda: seen.append(capsys.readouterr().err))
            raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert len(seen) == 1 and seen[0].startswith(said) and seen[0].count("\n") == 1
    assert capsys.readouterr().err == "(Cleaning up failed as well: ZeroDivisionError('division by zero'))\n"


def test_an_error_that_is_not_foreseen_keeps_its_traceback(capsys):
    with pytest.raises(KeyError, match="weight"), report_errors() as cleanup:
        cleanup.callback(lambda: 1 / 0)
        raise KeyError("weight")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_cleaning_up_after_a_good_end_may_fail():
    with pytest.raises(ZeroDivisionError), report_errors() as cleanup:
        cleanup.callback(lambda: 1 / 0)


@pytest.mark.slow
def test_a_process_among_several_does_not_wait_for_the_others_when_it_fails(tmp_path):
    start = time.monotonic()
    run = ForkedRun(make_config(tmp_path), 2, recipe="helpers.ending_worker")
    assert run.join(60) == [3, 2]
    assert time.monotonic() - start < 60
    assert run.output(0) == "error: The memory of cuda:0 ran out.\n"
    assert run.output(1).splitlines() == [
        "error: A file is missing on this node.",
        "(Cleaning up failed as well: RuntimeError('the connection is closed'))",
    ]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "section", "room"), [("teacher", "teacher_model", live), ("student", "model", build)]
)
def test_memory_that_is_too_small_for_a_model_names_it(tmp_path, monkeypatch, model, section, room):
    original = build.build_decoder

    def too_large(given, settings, world, **more):
        if given.path == section:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(given, settings, world, **more)

    monkeypatch.setattr(room, "build_decoder", too_large)
    with pytest.raises(RunError, match=f"^The memory of cpu ran out while loading the {model}, before the first step"):
        run_in_process(make_config(tmp_path))


@pytest.mark.heavy
def test_memory_for_the_gradients_norm_counts_as_the_optimizers(tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("torch.nn.utils.clip_grads_with_norm_", out_of_memory)
    with pytest.raises(RunError, match="ran out in step 1, phase: optimizer"):
        run_in_process(make_config(tmp_path, clip_grad_norm=1.0))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_process_that_hangs_in_the_first_step_is_waited_for_five_times_as_long_as_in_another(tmp_path):
    run = ForkedRun(make_config(tmp_path, process_group_timeout=5), 2, hold=("step", 1))
    assert run.wait_for("step", 1)
    run.processes[1].join(60)
    assert run.processes[1].exitcode == 3, run.output(1)
    assert "error: Another process of the run is gone, or this one waited for it" in run.output(1)
    run.kill()


@pytest.mark.heavy
def test_sigint_while_a_run_is_set_up_is_one_sentence(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    OmegaConf.save(make_config(tmp_path), tmp_path / "config.yaml")
    monkeypatch.setattr(kd, "set_up", interrupted)
    monkeypatch.setattr(sys, "argv", ["kd_single_device", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as ended:
        recipe.recipe_main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(
        "stopped: SIGINT came while nothing was being trained; start again with the same command.\n"
    )
