"""The end of writing, where a file system shows late what another process has written."""

import pytest
from omegaconf import OmegaConf

from helpers.cached import cache_config, documents_of, write
from helpers.forked import ForkedRun
from helpers.tiny import ROWS, make_config, write_rows
from torchtune_kd.caches import finish
from torchtune_kd.caches.layout import SHARDS, CacheManifest
from torchtune_kd.caches.reader import CacheReader
from torchtune_kd.errors import RunError

UNREADABLE = r"The cache in .* cannot be read \(.*Broken.*\): start again with the same command"
SMALL = {"tokens_per_batch": 48, "shard_size": 1}  # a shard for every batch


@pytest.mark.parametrize("appears_in", ["a folder", "a folder that is late itself"])
def test_a_file_that_appears_late_is_waited_for(tmp_path, monkeypatch, appears_in):
    file, waited = tmp_path / SHARDS / "a.safetensors", []
    if appears_in == "a folder":
        file.parent.mkdir()

    def appear(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            file.parent.mkdir(exist_ok=True)
            file.touch()

    monkeypatch.setattr(finish.time, "sleep", appear)
    finish.wait_for_files(tmp_path, [f"{SHARDS}/a.safetensors"])
    assert len(waited) == 3


def test_one_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "VISIBLE_WITHIN", 0.0)
    (tmp_path / SHARDS).mkdir()
    with pytest.raises(RunError, match=rf"The file {SHARDS}/a.safetensors, which .* into {tmp_path}, cannot be seen"):
        finish.wait_for_files(tmp_path, [f"{SHARDS}/a.safetensors"])


@pytest.mark.parametrize("listed", [0, 2])
def test_a_listing_that_lags_behind_loses_no_shard(tmp_path, monkeypatch, listed):
    """The index numbers shards in the order in which the reader does."""
    cfg = make_config(tmp_path)
    expected = write(cfg, tmp_path / "expected", **SMALL)
    assert len(expected.shards) > 3
    shown = iter([[], expected.shards[1:][:listed]])  # before anything is written, and at the end
    monkeypatch.setattr("torchtune_kd.cache_teacher.folder.whole_shards", lambda folder: next(shown))
    manifest = write(cfg, tmp_path / "cache", **SMALL)
    assert manifest.shards == expected.shards and manifest.index == expected.index


@pytest.mark.slow
@pytest.mark.parametrize("already", [0, 8], ids=["new", "half written"])
def test_two_processes_that_see_each_other_late_write_the_same_cache(tmp_path, already):
    cfg = make_config(tmp_path)
    write(cfg, tmp_path / "expected", dtype="int8", **SMALL)
    if already:
        rows = str(write_rows(tmp_path / "part.jsonl", ROWS[:already]))
        write(OmegaConf.merge(cfg, {"dataset": {"data_files": rows}}), tmp_path / "cache", dtype="int8", **SMALL)
    config = cache_config(cfg, tmp_path / "cache", dtype="int8", **SMALL)
    ForkedRun(config, 2, "helpers.late_files").finish()
    if not already:  # scales are those of the first tokens
        assert documents_of(tmp_path / "cache") == documents_of(tmp_path / "expected")
    assert documents_of(tmp_path / "cache").keys() == documents_of(tmp_path / "expected").keys()
    assert len(CacheReader(tmp_path / "cache").index) == CacheManifest.read(tmp_path / "expected").documents


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "folder.write_manifest",
            r"The manifest could not be written into .*\(.*Broken.*\): make room and start again",
        ),
        ("folder.file_facts", UNREADABLE),
        ("folder.safe_open", UNREADABLE),
        ("finish.wait_for_files", UNREADABLE),
    ],
)
def test_what_goes_wrong_at_the_end_is_said_and_made_up_for(tmp_path, monkeypatch, what, said):
    room = "torchtune_kd.cache_teacher." if what.startswith("folder") else "torchtune_kd.caches."
    cfg = make_config(tmp_path)

    def fail(*_, **__):
        raise OSError(5, "Broken")

    with monkeypatch.context() as patch:
        patch.setattr(room + what, fail)
        with pytest.raises(RunError, match=said):
            write(cfg, tmp_path / "cache", **SMALL)
    assert write(cfg, tmp_path / "cache", **SMALL).documents == len(CacheReader(tmp_path / "cache").index)
