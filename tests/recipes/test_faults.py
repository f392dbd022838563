"""One fault a test: what is lost (nothing), what goes on, and the one sentence that says so."""

import contextlib
import json
import re
import resource
import shutil
import subprocess

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune.modules import TransformerDecoder

import torchtune_kd.models.student as models_module
from helpers.forked import ForkedRun
from helpers.resumable import assert_same_run, at_steps, is_whole, resumable_config, weights_of
from helpers.tiny import make_config, read_log, run_in_process
from torchtune_kd.checkpoints.folders import step_folders
from torchtune_kd.storage.manifest import Manifest
from torchtune_kd.teachers.live import LiveTeacher
from torchtune_kd.training import RunError, Stopped, UserError, checkpoint_if_due

# --- a disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that holds the run with little to spare."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]).returncode != 0:
        pytest.skip("mounting a tmpfs needs root; the test with RLIMIT_FSIZE runs everywhere")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, small_disk, capfd):
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"))
    run_in_process(undisturbed)
    capfd.readouterr()
    cfg = resumable_config(tmp_path, output_dir=str(small_disk / "out"))
    seen = []

    def look():
        seen.append({path.name for path in (small_disk / "out").iterdir() if path.is_dir()} - {"logs"})
        assert all(is_whole(folder) for folder in step_folders(small_disk / "out"))
        (small_disk / "filler").unlink()

    run_in_process(cfg, on=at_steps({3: lambda: fill(small_disk), 5: look}))
    assert seen == [{"step_2"}]  # step_4 failed and left nothing behind
    message = capfd.readouterr().err
    warning = (
        f"warning: the checkpoint {small_disk}/out/step_4 could not be written ([Errno 28] No space left on device): "
        "the run goes on, and the checkpoint before it stays the last."
    )
    assert message.count(warning) == 1
    assert "Traceback" not in message
    assert_same_run(cfg, undisturbed)  # log lines that found no room came later


@pytest.mark.slow
def test_a_full_disk_at_the_final_export_ends_with_one_sentence(tmp_path, small_disk):
    cfg = resumable_config(tmp_path, output_dir=str(small_disk / "out"))
    with pytest.raises(RunError, match=r"weights of epoch 1 could not be written to .*/disk/out \(.*No space.*resume"):
        run_in_process(cfg, on=at_steps({12: lambda: fill(small_disk)}))
    names = {path.name for path in (small_disk / "out").iterdir() if path.is_dir()}
    assert names == {"logs", "epoch_0", "step_10", "step_12"}
    (small_disk / "filler").unlink()
    run_in_process(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}))
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"))
    run_in_process(undisturbed)
    assert_same_run(cfg, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_may_not_grow_fails_a_save_and_not_the_run(tmp_path, monkeypatch, capfd, background):
    """The kernel refuses writes beyond RLIMIT_FSIZE as it does on a full disk."""
    cfg = resumable_config(tmp_path, enable_async_checkpointing=background)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    def lift():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        run_in_process(cfg, on=at_steps({3: limit, 5: lift}))
    finally:
        lift()
    assert f"{tmp_path}/out/step_4 could not be written ([Errno 27] File too large)" in capfd.readouterr().err
    assert [folder.name for folder in step_folders(tmp_path / "out")] == ["step_12", "step_10"]
    assert not list((tmp_path / "out").glob("*.partial"))


# --- losses and gradients that are not finite

BAD = "#"  # its row of the teacher's embedding is NaN


def with_bad_rows(folder, rows, **overrides):
    """A run whose rows with a ``#`` have no finite loss."""
    cfg = make_config(folder, rows=rows, **overrides)
    path = folder / "teacher" / "model.safetensors"
    weights = load_file(path)
    vocabulary = json.loads((folder / "teacher" / "tokenizer.json").read_text())["model"]["vocab"]
    weights["model.embed_tokens.weight"][vocabulary[BAD]] = float("nan")
    save_file(weights, path)
    return cfg


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(tmp_path, capfd):
    rows = ["good and long enough"] * 4 + ["some # inside"] + ["good again"] * 7
    cfg = with_bad_rows(tmp_path, rows, optimizer__weight_decay=0.1)
    cfg.epochs = 1
    run = run_in_process(cfg)
    steps = read_log(cfg.output_dir)
    assert [step.get("skipped_steps", 0) for step in steps] == [0, 1, 1]
    assert [step["loss"] == step["loss"] for step in steps] == [True, False, True]
    assert run.optimizer.state[run.trainable[0]]["step"] == 2
    assert re.search(
        r"warning: step 2 is skipped, since its loss \(nan\) or gradient norm \(nan\) is not finite",
        capfd.readouterr().err,
    )

    alone = make_config(tmp_path / "alone", rows=rows[:4] + rows[8:], optimizer__weight_decay=0.1)
    shutil.copytree(tmp_path / "teacher", tmp_path / "alone" / "teacher", dirs_exist_ok=True)
    run_in_process(alone)
    for name, weight in weights_of(alone, 0).items():
        assert torch.equal(weight, weights_of(cfg, 0)[name]), name


def test_too_many_in_a_row_end_the_run_and_leave_the_batch(tmp_path):
    rows = ["good and long enough"] * 4 + ["some # inside"] * 12
    cfg = with_bad_rows(tmp_path, rows, max_skipped_steps=2, save_every_n_steps=1, batch_size=2)
    cfg.gradient_accumulation_steps = 2
    with pytest.raises(RunError) as ended:
        run_in_process(cfg)
    message = str(ended.value)
    assert message.startswith("2 steps in a row had no finite loss and gradient (the last, step 3: loss nan")
    assert f"rows 8, 9, 10, 11 of `dataset`, it is written to {tmp_path}/out/bad_step_3" in message
    bad = torch.load(tmp_path / "out" / "bad_step_3" / "rank_0.pt")
    assert bad["rows"] == [8, 9, 10, 11] and bad["step"] == 3
    assert [batch["tokens"].shape[0] for batch in bad["microbatches"]] == [2, 2]
    assert is_whole(tmp_path / "out" / "step_2")


@pytest.mark.slow
def test_all_processes_skip_the_same_step(tmp_path):
    rows = ["good and long enough"] * 4 + ["fine", "some # inside", "fine too", "fine as well"] + ["good again"] * 4
    cfg = with_bad_rows(tmp_path, rows, batch_size=2)
    ForkedRun(cfg, 2).finish()
    assert [step.get("skipped_steps", 0) for step in read_log(cfg.output_dir)] == [0, 1, 1]
    one = with_bad_rows(tmp_path, rows, output_dir=str(tmp_path / "one"))
    run_in_process(one)
    for name, weight in weights_of(one, 0).items():
        torch.testing.assert_close(weights_of(cfg, 0)[name], weight, rtol=0, atol=1e-5)


# --- memory


PHASES = {
    "teacher": (LiveTeacher, "forward"),
    "student forward": (TransformerDecoder, "forward"),
    "loss": (models_module, "linear_kd_objective"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
}


def runs_out_once(monkeypatch, owner, name, when=lambda *_: True):
    """The memory of a device that is full, which what computes the advice does without."""
    original, full = getattr(owner, name), []

    def function(*args, **kwargs):
        if full or not when(*args):
            return original(*args, **kwargs)
        full.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("phase", PHASES)
def test_out_of_memory_names_the_phase_and_what_helps_most(tmp_path, monkeypatch, phase):
    cfg = make_config(tmp_path, gradient_accumulation_steps=2)
    trains = phase == "student forward"
    runs_out_once(
        monkeypatch,
        *PHASES[phase],
        when=lambda owner, *_: not trains or any(parameter.requires_grad for parameter in owner.parameters()),
    )
    with pytest.raises(RunError) as ended:
        run_in_process(cfg)
    message = str(ended.value)
    assert f"ran out in step 1, phase: {phase} (microbatches of up to 4 x" in message, message
    savings = [
        float(size) * {"GiB": 1024, "MiB": 1}[unit] for size, unit in re.findall(r"saves ([\d.]+) (GiB|MiB)", message)
    ]
    assert len(savings) == 3 and savings == sorted(savings, reverse=True) and savings[0] > 0
    if phase == "optimizer":  # by then activations are gone
        assert "activation" not in message and "batch_size" not in message


# --- rows that cannot be tokenised


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_that_cannot_be_tokenised_is_named(tmp_path, packed):
    cfg = make_config(tmp_path, dataset__packed=packed)
    rows = [json.dumps({"text": text}) + "\n" for text in ["good", "good", None, "good"]]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with pytest.raises(UserError, match=r"Row 2 of `dataset` cannot be tokenised, correct or remove it: \w+Error: "):
        run_in_process(cfg)


# --- a save in the background


@pytest.mark.slow
def test_a_save_in_the_background_that_fails_is_made_up_for_when_the_run_is_stopped(tmp_path, monkeypatch):
    """The signal comes while the failing checkpoint of the same step is being written: the run writes it again."""
    cfg = resumable_config(tmp_path, enable_async_checkpointing=True)
    original, failures = Manifest.write, []

    def fail_once(self, folder):
        if self.progress["global_step"] == 4 and not failures:
            failures.append(folder)
            raise OSError(28, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(Manifest, "write", fail_once)

    def stop_at_4(run):
        if run.progress.global_step == 4:
            run.stopping = True
            checkpoint_if_due(run)

    with pytest.raises(Stopped, match=r"after step 4; its checkpoint is .*/step_4: go on"):
        run_in_process(cfg, on={"between steps": stop_at_4})
    assert len(failures) == 1 and is_whole(tmp_path / "out" / "step_4")
