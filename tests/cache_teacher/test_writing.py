"""The writer: what it stores, how it goes on, and what it refuses."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from helpers.cached import cache_config, documents_of, write
from helpers.forked import ForkedRun
from helpers.tiny import ROWS, dataset_section, make_config, write_rows
from torchtune_kd.cache_teacher import folder as folders
from torchtune_kd.cache_teacher import read_request
from torchtune_kd.caches.layout import HEAD, SHARDS, CacheManifest
from torchtune_kd.errors import RunError, UserError

RECIPE = "torchtune_kd.recipes.cache_teacher"
SMALL = {"tokens_per_batch": 48, "shard_size": 1}  # a shard for every batch


def test_every_document_once_and_nothing_without_a_label(tmp_path):
    """A row of one character has no next token; rows that are there twice are one document."""
    cfg = make_config(tmp_path, rows=[*ROWS, *ROWS[:5]])
    cfg.dataset_val = dataset_section(write_rows(tmp_path / "val.jsonl", [ROWS[3], "another row"]))
    manifest = write(cfg, tmp_path / "cache", **SMALL)
    rows = {row for row in [*ROWS, "another row"] if len(row) > 1}
    assert manifest.documents == len(documents_of(tmp_path / "cache")) == len(rows)
    assert manifest.tokens == sum(len(row) - 1 for row in rows)
    assert manifest == CacheManifest.read(tmp_path / "cache")
    head = load_file(tmp_path / "cache" / HEAD)
    whole = load_file(tmp_path / "teacher" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head["weight"], whole) and head["channel_rms"].shape == (whole.shape[1],)


def test_all_positions(tmp_path):
    cfg = make_config(tmp_path)
    manifest = write(cfg, tmp_path / "cache", positions="all")
    assert manifest.tokens == sum(len(row) for row in {row for row in ROWS if len(row) > 1})


def test_a_finished_cache_takes_what_is_new_and_reads_no_teacher_otherwise(tmp_path, monkeypatch):
    cfg = make_config(tmp_path)
    write(cfg, tmp_path / "cache", **SMALL)
    first = documents_of(tmp_path / "cache")
    write_rows(tmp_path / "rows.jsonl", [*ROWS, "a row that is new"])
    manifest = write(cfg, tmp_path / "cache", **SMALL)
    second = documents_of(tmp_path / "cache")
    assert manifest.documents == len(second) == len(first) + 1
    assert {key: rows for key, rows in second.items() if key in first} == first
    assert len(list((tmp_path / "cache").glob("index-*"))) == 1
    monkeypatch.setattr("torchtune_kd.cache_teacher.run.build_teacher", None)
    assert write(cfg, tmp_path / "cache", verify=True).documents == manifest.documents


def test_more_labels_of_a_document_are_added_without_touching_what_is_read(tmp_path):
    cfg = make_config(tmp_path)
    first = write(cfg, tmp_path / "cache")
    before = {name: (tmp_path / "cache" / name).read_bytes() for name in first.files if name.startswith(SHARDS)}
    manifest = write(cfg, tmp_path / "cache", positions="all")
    assert manifest.tokens == sum(len(row) for row in {row for row in ROWS if len(row) > 1})
    assert all((tmp_path / "cache" / name).read_bytes() == content for name, content in before.items())
    assert write(cfg, tmp_path / "cache", positions="all", verify=True) == manifest  # nothing is written anew


def test_labels_that_do_not_hold_those_that_are_stored(tmp_path):
    """The two sets are stored together. A row without a token is none."""
    cfg = make_config(tmp_path)
    found = []
    for first, last in ((10, 20), (2, 6), (10, 20)):
        cfg.dataset = {"_component_": "helpers.tiny.masked_dataset", "first": first, "last": last}
        found.append(write(cfg, tmp_path / "cache").tokens)
    assert found == [10, 14, 14]


def test_what_a_killed_writer_left_of_another_teacher_is_no_head_of_this_one(tmp_path):
    """Its head was written before its first shard."""
    cfg = make_config(tmp_path)
    write(cfg, tmp_path / "cache")
    folder = tmp_path / "cache"
    for file in [folder / "manifest.json", *folder.glob("index-*"), *(folder / SHARDS).iterdir()]:
        file.unlink()
    other = cfg.copy()
    other.teacher_model.num_layers = 1
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    kept = {name: 2 * weight for name, weight in weights.items() if "layers.1." not in name}
    (tmp_path / "other").mkdir()
    save_file(kept, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "teacher" / "config.json").read_text())
    other.teacher_checkpointer.checkpoint_dir = str(tmp_path / "other")
    write(other, folder)
    assert torch.equal(load_file(folder / HEAD)["weight"], kept["lm_head.weight"])


def test_states_in_8_bits_without_their_head_are_refused(tmp_path):
    cfg = make_config(tmp_path)
    write(cfg, tmp_path / "cache", dtype="int8")
    (tmp_path / "cache" / HEAD).unlink()
    with pytest.raises(UserError, match="is gone or cannot be read, without which its 8-bit states mean nothing"):
        write(cfg, tmp_path / "cache", dtype="int8")


def test_a_head_that_is_gone_is_written_again(tmp_path):
    cfg = make_config(tmp_path)
    manifest = write(cfg, tmp_path / "cache")
    before = {name: tensor.clone() for name, tensor in load_file(tmp_path / "cache" / HEAD).items()}  # off the map
    (tmp_path / "cache" / HEAD).write_bytes(b"no head")
    again = write(cfg, tmp_path / "cache")
    assert again.index == manifest.index and again.error == manifest.error
    after = load_file(tmp_path / "cache" / HEAD)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ids_that_the_teacher_has_not(tmp_path):
    cfg = make_config(tmp_path)
    cfg.teacher_model.vocab_size = 40
    with pytest.raises(UserError, match=r"Expected|has 384"):
        write(cfg, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_and_restarted_on_other_processes(tmp_path, kills):
    """Each document is there once, with the very bytes that an undisturbed writer stores."""
    cfg = make_config(tmp_path)
    write(cfg, tmp_path / "undisturbed", **SMALL)
    expected = documents_of(tmp_path / "undisturbed")
    draw, killed, folder = np.random.default_rng(kills), 0, tmp_path / "cache"
    config = cache_config(cfg, folder, **SMALL)
    for _ in range(3 * kills):
        run = ForkedRun(config, int(draw.integers(1, 4)), RECIPE)
        target = len(list(folder.glob(f"{SHARDS}/*.safetensors"))) + int(draw.integers(0, 2))
        while run.processes[0].is_alive() and len(list(folder.glob(f"{SHARDS}/*.safetensors"))) < target:
            run.processes[0].join(0.001)
        run.processes[0].join(float(draw.uniform(0, 0.03)) if target else float(draw.uniform(0.3, 1.5)))
        run.kill()
        finished = run.processes[0].exitcode != -9
        killed += not finished
        if killed == kills:
            break
        if finished or killed % 5 == 4:  # begin anew, or there is soon nothing left to kill
            for file in (folder / SHARDS).glob("*"):
                file.unlink()
    assert killed == kills
    for size in (2, 1):  # the first writes what is left, the second finds nothing to do
        ForkedRun(config, size, RECIPE).finish()
    assert documents_of(folder) == expected
    assert CacheManifest.read(folder).tokens == CacheManifest.read(tmp_path / "undisturbed").tokens


@pytest.mark.slow
def test_a_signal_ends_it_with_what_is_written(tmp_path):
    cfg = make_config(tmp_path)
    config = cache_config(cfg, tmp_path / "cache", **SMALL)
    run = ForkedRun(config, 2, RECIPE)
    while not list(tmp_path.glob(f"cache/{SHARDS}/*.safetensors")):
        assert run.processes[0].is_alive(), run.output()
        run.processes[0].join(0.002)
    run.send(signal.SIGTERM)
    codes = run.join()
    if codes != [0, 0]:  # it may have been done before it heard
        assert codes == [75, 75], run.output()
        assert "stopped: SIGTERM ended the writing after" in run.output()
        assert "start it again with the same command to go on." in run.output()
    ForkedRun(config, 1, RECIPE).finish()
    write(cfg, tmp_path / "undisturbed", **SMALL)
    assert documents_of(tmp_path / "cache") == documents_of(tmp_path / "undisturbed")


def test_a_changed_shard_is_found_by_verify(tmp_path):
    cfg = make_config(tmp_path)
    write(cfg, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / SHARDS).iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=rf"The file {SHARDS}/{file.name} in .* is not what was written"):
        write(cfg, tmp_path / "cache", verify=True)


@pytest.mark.parametrize(
    "keys, change, sentence",
    [
        ({"dtype": "int8"}, {}, r'holds a cache with another dtype \("fp32" in .*, now "int8"\)'),
        ({}, {"teacher_model.num_layers": 1}, "cannot"),
        ({}, {"tokenizer.path": "other"}, "holds a cache with another tokenizer"),
        ({}, {"dtype": "bf16"}, r'holds a cache with another computed_in \("fp32" in .*, now "bf16"\)'),
    ],
)
def test_a_folder_of_another_cache(tmp_path, keys, change, sentence):
    cfg = make_config(tmp_path)
    write(cfg, tmp_path / "cache")
    for key, value in change.items():
        if value == "other":
            text = (tmp_path / "student" / "tokenizer.json").read_text()
            (tmp_path / "tokenizer.json").write_text(text + " ")
            value = str(tmp_path / "tokenizer.json")
        OmegaConf.update(cfg, key, value)
    if sentence == "cannot":
        sentence = "holds a cache with another teacher"
    with pytest.raises(UserError, match=sentence):
        write(cfg, tmp_path / "cache", **keys)


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"folder": None}, "Expected `cache.folder` to be str, got None: change it."),
        ({"dtyp": "bf16"}, "Unknown key `cache.dtyp`: did you mean `dtype`?"),
        ({"dtype": "fp8"}, "Expected `cache.dtype` to be fp32 or bf16 or fp16 or int8, got 'fp8': change it."),
        ({"kind": "logits"}, "Expected `cache.kind` to be hidden or top_k or sampled, got 'logits': change it."),
        ({"positions": 1}, "Expected `cache.positions` to be str, got 1: change it."),
        ({"tokens_per_batch": 0}, "Expected `cache.tokens_per_batch` to be at least 1, got 0: change it."),
        ({"shard_size": "2 furlongs"}, "such as 536870912 or 512MiB, got '2 furlongs': change it."),
    ],
)
def test_mistakes_in_the_keys(tmp_path, keys, sentence):
    with pytest.raises(UserError) as caught:
        read_request(cache_config(make_config(tmp_path), tmp_path / "cache", **keys))
    assert sentence in str(caught.value)


def test_configs_without_a_teacher_to_write(tmp_path):
    cfg = make_config(tmp_path)
    for section in ("x", "", 0, False):
        with pytest.raises(UserError, match=rf"Expected a section `cache` with a `folder`, got {section!r}"):
            read_request(OmegaConf.merge(cfg, {"cache": section}))
    with pytest.raises(UserError, match=r"Expected `cache\.folder` in the config, but it is missing"):
        read_request(cfg)
    with pytest.raises(UserError, match=r"Expected `cache\.folder` in the config, but it is missing"):
        read_request(cache_config(cfg, None))
    with pytest.raises(UserError, match="`kd_ratio: 0` runs no teacher"):
        read_request(cache_config(make_config(tmp_path, kd_ratio=0.0), tmp_path / "cache"))
    several = OmegaConf.merge(cfg, {"teacher_model": None, "teacher_checkpointer": None, "teachers": [{"self": "ema"}]})
    with pytest.raises(UserError, match="A cache is of one teacher, but the config has `teachers`"):
        read_request(cache_config(several, tmp_path / "cache"))


def test_the_config_of_a_run_from_a_cache_says_where_to_write(tmp_path):
    cfg = OmegaConf.merge(make_config(tmp_path), {"teacher_cache": "x", "teacher_tail": None})
    request = read_request(cfg)
    assert (request.folder, request.config.teacher_cache) == (Path("x"), None)
    assert read_request(OmegaConf.merge(cfg, {"cache": {"dtype": "int8"}})).keys.dtype == "int8"
    assert read_request(cache_config(cfg, "x/")).folder == Path("x")
    with pytest.raises(
        UserError, match=r"`cache\.folder` to be what the config's run reads, `teacher_cache: x`, got y"
    ):
        read_request(cache_config(cfg, "y"))


@pytest.mark.parametrize("size, number", [("1", 1), (7, 7), ("1.5KiB", 1536), ("2 GB", 2 * 10**9)])
def test_sizes(tmp_path, size, number):
    request = read_request(cache_config(make_config(tmp_path), tmp_path / "cache", shard_size=size))
    assert request.shard_bytes == number


def test_a_disk_without_room_is_refused_before_the_teacher_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr("torchtune_kd.cache_teacher.run.build_teacher", None)
    with pytest.raises(UserError, match=r"Expected \d+ kB of room in .*, but 1 kB are free: make room"):
        write(make_config(tmp_path), tmp_path / "cache")


def test_rows_that_change_are_refused(tmp_path):
    cfg = make_config(tmp_path)
    cfg.dataset._component_ = "helpers.tiny.noisy_dataset"
    with pytest.raises(UserError, match="of `dataset` gives other tokens each time it is read"):
        write(cfg, tmp_path / "cache")


def test_no_label_anywhere(tmp_path):
    with pytest.raises(UserError, match="has a token with a label: there is nothing to write"):
        write(make_config(tmp_path, rows=["a", "b"]), tmp_path / "cache")


@pytest.mark.parametrize("number, text", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (8.2e12, "8.2 TB")])
def test_bytes_as_text(number, text):
    assert folders.size(number) == text
