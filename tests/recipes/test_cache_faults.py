"""Damage a cache while a run trains from it, or between a kill and the resume: one sentence, nothing lost."""

import re
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from helpers.cached import cached, doctored, shard_of, write
from helpers.forked import ForkedRun
from helpers.resumable import (
    assert_same_run,
    at_steps,
    is_whole,
    killed_run,
    resumable_config,
    resume,
    resumed,
    weights_of,
)
from helpers.tiny import ROWS, make_config, read_log, run_in_process, write_rows
from torchtune_kd.caches.layout import SHARDS, CacheManifest
from torchtune_kd.caches.shards import read_header
from torchtune_kd.checkpoints.folders import step_folders
from torchtune_kd.errors import RunError, UserError

EACH = {"tokens_per_batch": 1, "shard_size": 1}  # a shard for every document


def config(folder, name, **more):
    cfg = resumable_config(folder, output_dir=str(folder / name), **more)
    return cached(cfg, folder / "cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with a shard for every document, and a run from it to which nothing happened."""
    folder = tmp_path_factory.mktemp("made")
    write(resumable_config(folder), folder / "cache", **EACH)
    run_in_process(config(folder, "undisturbed"))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """All of it, to be done harm to."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def lose(shard):
    shard.unlink()


def cut(shard):
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])


def flip(shard):
    columns, _ = read_header(shard)
    content = bytearray(shard.read_bytes())
    content[columns["states"].offset] ^= 1
    shard.write_bytes(content)


HARM = {
    lose: "cannot be read, No such file or directory: see that its disk is there",
    cut: r"cannot be read, it ends \d+ bytes too early: see that",
    flip: "is not what was written, its checksum differs",
}


@pytest.mark.parametrize("harm", HARM)
def test_a_shard_that_is_harmed_ends_the_run_and_once_it_is_mended_nothing_is_lost(folder, harm):
    """Mended as the sentence says: the file is deleted, and the writer started again."""
    shards = sorted((folder / "cache" / SHARDS).iterdir())
    cfg = config(folder, "harmed")
    with pytest.raises(RunError) as ended:
        run_in_process(cfg, on=at_steps({5: lambda: [harm(shard) for shard in shards]}))
    named = re.search(r"The document [0-9a-f]{32} in (\S+) " + HARM[harm], str(ended.value))
    assert named and named[1] in map(str, shards), ended.value
    assert str(ended.value).endswith(
        "delete that file and run `tune run torchtune_kd/cache_teacher` again, which writes what is missing."
    )
    assert [step.name for step in step_folders(folder / "harmed")] == ["step_4", "step_2"]
    assert all(map(is_whole, step_folders(folder / "harmed")))
    if harm is lose:
        with pytest.raises(UserError, match=rf"The cache in {folder}/cache cannot be used, the file .* is missing"):
            resume(cfg)
    for shard in shards:
        shard.unlink(missing_ok=True)
    write(resumable_config(folder), folder / "cache", **EACH)
    resume(cfg)
    assert_same_run(cfg, config(folder, "undisturbed"))


@pytest.mark.slow
def test_a_process_ends_with_one_sentence_and_its_exit_code(folder):
    cfg = config(folder, "harmed", batch_size=1, gradient_accumulation_steps=4)
    run = ForkedRun(cfg, hold=("between steps", 3))
    assert run.wait_for("between steps", 3)
    for shard in (folder / "cache" / SHARDS).iterdir():
        flip(shard)
    run.wake()
    assert run.join(60) == [3]
    said = run.output()
    assert re.search("error: The document .* its checksum differs", said) and said.count("error:") == 1, said
    assert "Traceback" not in said and is_whole(folder / "harmed" / "step_2")


@pytest.mark.slow
def test_when_one_of_two_processes_meets_it_both_end(folder):
    """Rows are dealt out in turn, so that row 19 is the second process's, in step 5."""
    cfg = config(folder, "harmed", batch_size=2, shuffle=False, run_val_every_n_steps=None)
    del cfg["dataset_val"]
    shard, key = shard_of(folder / "cache", cfg, 19)
    whole = shard.read_bytes()
    run = ForkedRun(cfg, 2, hold=("between steps", 2))
    assert run.wait_for("between steps", 2), run.output()
    flip(shard)
    run.wake()
    assert run.join(60) == [3, 3]
    first, second = run.output(0), run.output(1)
    assert f"error: The document {key.hex()} in {shard} is not what was written" in second
    assert "error: Another process of the run is gone, or this one waited for it" in first
    assert "Traceback" not in first + second and is_whole(folder / "harmed" / "step_4")
    shard.write_bytes(whole)
    ForkedRun(resumed(cfg), 2).finish()
    expected = OmegaConf.merge(cfg, {"output_dir": str(folder / "expected")})
    ForkedRun(expected, 2).finish()
    assert_same_run(cfg, expected)


def test_a_cache_that_cannot_be_read_at_resume_is_waited_for_by_the_checkpoint(folder):
    """A folder that leads to itself cannot be read by anybody; nor can one on a disk that is gone."""
    cfg = config(folder, "killed")
    killed_run(cfg, 5)
    moved = (folder / "cache").rename(folder / "moved")
    with pytest.raises(UserError, match=rf"to be a folder that .*cache_teacher wrote, but {folder}/cache is none"):
        resume(cfg)
    (folder / "cache").symlink_to(folder / "cache")
    with pytest.raises(UserError, match=rf"The cache in {folder}/cache cannot be read \(.*: see that its disk is"):
        resume(cfg)
    (folder / "cache").unlink()
    moved.rename(folder / "cache")
    resume(cfg)
    assert_same_run(cfg, config(folder, "undisturbed"))


def test_a_cache_may_grow_while_a_run_reads_it_and_before_it_is_resumed(folder):
    """The run that goes on has the old index; the one that is resumed the new one, and the same rows."""
    more = [resumable_config(folder) for _ in range(2)]
    for number, cfg in enumerate(more, 1):
        rows = [*ROWS, *(f"a row that is new, {each}" for each in range(number))]
        cfg.dataset.data_files = str(write_rows(folder / f"more{number}.jsonl", rows))
    before = CacheManifest.read(folder / "cache")
    cfg = config(folder, "killed")
    killed_run(cfg, 7, {3: lambda: write(more[0], folder / "cache", **EACH)})
    write(more[1], folder / "cache", **EACH)
    resume(cfg)
    assert CacheManifest.read(folder / "cache").documents == before.documents + 2
    assert_same_run(cfg, config(folder, "undisturbed"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"dtype": "bf16"},
            r"signal of the teacher \(hidden states in fp32 from a cache, .* then, hidden states in bf16 from a cache",
        ),
        ({"dtype": None, "kind": "top_k"}, r"\(hidden states in fp32 .* then, the 64 likeliest ids from a cache"),
        ("teacher", r"weights of the teacher \(\w+ then, \w+ now\)"),
    ],
    ids=["dtype", "kind", "teacher"],
)
def test_another_cache_in_its_place_is_refused_by_name(folder, other, said):
    cfg = config(folder, "killed")
    killed_run(cfg, 4)
    shutil.rmtree(folder / "cache")
    writer = resumable_config(folder)
    if other == "teacher":
        shutil.copy(folder / "teacher" / "model.safetensors", folder / "teacher" / "other.safetensors")
        with (folder / "teacher" / "other.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\1")
        writer.teacher_checkpointer.checkpoint_files = ["other.safetensors"]
    write(writer, folder / "cache", **({} if other == "teacher" else other))
    with pytest.raises(UserError, match=said) as refused:
        resume(cfg)
    assert "was made with other settings" in str(refused.value) and "\n" not in str(refused.value)
    assert is_whole(folder / "killed" / "step_4")


# --- numbers that are not finite, with right checksums


def spoil(entry):
    """Put a NaN into what is read of the second token."""
    (name,) = entry.columns.keys() & {"scale", "log_probs"} or {"states"}
    entry.columns[name][1].fill_(float("nan"))


@pytest.mark.parametrize(
    "keys",
    [{"dtype": "bf16"}, {"dtype": "int8"}, {"dtype": None, "kind": "top_k", "k": 8}],
    ids=["bf16", "int8", "likeliest ids"],
)
def test_a_stored_nan_is_a_step_that_is_skipped(tmp_path, keys, capfd):
    """As with a teacher that gives one: weights and optimizer are those of a run without the step's rows."""
    rows = ["good and long enough"] * 4 + ["fine", "this is the bad one", "fine too", "and fine"] + ["good again"] * 4
    cfg = make_config(tmp_path, rows=rows, output_dir=str(tmp_path / "out"))
    write(cfg, tmp_path / "cache", **keys)
    cfg = cached(cfg, tmp_path / "cache")
    without = make_config(tmp_path / "without", rows=rows[:4] + rows[8:])
    without = cached(without, tmp_path / "whole")
    shutil.copytree(tmp_path / "cache", tmp_path / "whole")
    _, key = shard_of(tmp_path / "cache", cfg, 5)
    doctored(tmp_path / "cache", lambda entry: entry.key == key and spoil(entry))
    run = run_in_process(cfg)
    steps = read_log(cfg.output_dir)
    assert [step.get("skipped_steps", 0) for step in steps] == [0, 1, 1]
    assert run.optimizer.state[run.trainable[0]]["step"] == 2
    assert (
        "warning: step 2 is skipped, since its loss (nan) or gradient norm (nan) is not finite"
        in capfd.readouterr().err
    )
    run_in_process(without)
    assert len(read_log(without.output_dir)) == 2
    for name, weight in weights_of(without, 0).items():
        assert torch.equal(weight, weights_of(cfg, 0)[name]), name
