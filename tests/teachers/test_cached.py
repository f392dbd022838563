"""A run from a cache logs what a run beside its teacher logs."""

import pytest
import torch
from omegaconf import OmegaConf

from helpers.cached import cached, write
from helpers.forked import ForkedRun
from helpers.resumable import CLOCK, interrupted_and_resumed, log_of, resumable_config
from helpers.tiny import ROWS, dataset_section, make_config, read_log, run_in_process, write_rows
from torchtune_kd.errors import RunError, UserError

LOSSES = {
    "ForwardKLLoss": {}, "ReverseKLLoss": {}, "SymmetricKLLoss": {}, "JSDLoss": {"beta": 0.3},
    "SkewForwardKLLoss": {}, "SkewReverseKLLoss": {}, "TVDLoss": {},
}  # fmt: skip
SUMMED = 1e-6  # of fp32 sums in another order, relative


def config(folder, out="", packed=False, **more):
    cfg = make_config(folder, output_dir=str(out), max_steps_per_epoch=2, **more)
    cfg.dataset = dataset_section(folder / "rows.jsonl", packed=packed)
    if packed:
        cfg.tokenizer.max_seq_len = 50
        cfg.dataset.split_across_pack = False
    cfg.dataset_val = dataset_section(write_rows(folder / "val.jsonl", ROWS[5:12]))
    return cfg


def assert_same_log(one, other, relative=SUMMED):
    logs = [read_log(cfg.output_dir) for cfg in (one, other)]
    assert len(logs[0]) == len(logs[1]) > 2
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - CLOCK:
            assert ours[name] == pytest.approx(theirs[name], rel=relative, abs=relative), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of rows that stand alone; every variant below reads this one."""
    folder = tmp_path_factory.mktemp("cached")
    write(config(folder), folder / "cache")
    return folder


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_divergence_and_temperature(folder, tmp_path, loss, temperature):
    section = {"_component_": f"torchtune_kd.losses.{loss}", "temperature": temperature, **LOSSES[loss]}
    live = config(folder, tmp_path / "live", kd_loss=section)
    run_in_process(live)
    from_cache = cached(live, folder / "cache", output_dir=str(tmp_path / "cached"))
    run = run_in_process(from_cache)
    assert not hasattr(run.teacher.teacher, "decoder")
    assert_same_log(live, from_cache)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("more", [{"shuffle": True}, {"batch_size": 3, "gradient_accumulation_steps": 3}], ids=str)
def test_other_orders_batches_and_packs(folder, tmp_path, packed, more):
    live = config(folder, tmp_path / "live", packed=packed, **more)
    run_in_process(live)
    from_cache = cached(live, folder / "cache", output_dir=str(tmp_path / "cached"))
    run_in_process(from_cache)
    assert_same_log(live, from_cache)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_other_numbers_of_processes(folder, tmp_path, size):
    """The head is sharded, and the states of each process are those of its rows."""
    live = config(folder, tmp_path / "live", batch_size=6)
    run_in_process(live)
    from_cache = cached(live, folder / "cache", output_dir=str(tmp_path / "cached"), batch_size=6 // size)
    ForkedRun(from_cache, size).finish()
    assert_same_log(live, from_cache, relative=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_rounded_states_are_within_the_error_that_the_manifest_states(folder, tmp_path, dtype):
    """A student is measured against p' instead of p."""
    manifest = write(config(folder), tmp_path / "cache", dtype=dtype)
    live = config(folder, tmp_path / "live")
    run_in_process(live)
    from_cache = cached(live, tmp_path / "cache", output_dir=str(tmp_path / "cached"))
    run_in_process(from_cache)
    error = manifest.error["gradient_error"]
    assert 0 < error < 0.05
    assert_same_log(live, from_cache, relative=2 * error)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_it_is_the_same_run(tmp_path, kind):
    cfg = resumable_config(tmp_path, kind, output_dir=str(tmp_path / "whole"))
    write(cfg, tmp_path / "cache")
    whole = cached(cfg, tmp_path / "cache")
    run_in_process(whole)
    part = cached(cfg, tmp_path / "cache", output_dir=str(tmp_path / "part"))
    interrupted_and_resumed(part)
    assert log_of(part) == log_of(whole)


def test_a_resumed_run_sees_that_its_teacher_is_another_one_now(tmp_path):
    cfg = make_config(tmp_path, save_every_n_steps=2, max_steps_per_epoch=2)
    run_in_process(cfg)
    write(cfg, tmp_path / "cache", dtype="int8")
    cfg = cached(cfg, tmp_path / "cache", resume_from_checkpoint=True, max_steps_per_epoch=4)
    with pytest.raises(
        UserError, match=r"signal of the teacher \(none then, hidden states in int8 from a cache, computed"
    ):
        run_in_process(cfg)


@pytest.mark.parametrize("head", [None, "float8"])
def test_the_head_may_be_in_8_bits(folder, tmp_path, head):
    live = config(folder, tmp_path / "live")
    live.teacher_head = head
    run_in_process(live)
    from_cache = cached(live, folder / "cache", output_dir=str(tmp_path / "cached"))
    run_in_process(from_cache)
    assert_same_log(live, from_cache, relative=1e-5)


def test_rows_that_are_not_there_are_counted_before_weights_load(folder, tmp_path, monkeypatch):
    cfg = config(folder)
    cfg.dataset.data_files = str(write_rows(tmp_path / "more.jsonl", [*ROWS, "a new row", "another one"]))
    monkeypatch.setattr("torchtune_kd.training.setup.load_weights", None)
    with pytest.raises(UserError) as caught:
        run_in_process(cached(cfg, folder / "cache", output_dir=str(tmp_path / "out")))
    assert f"2 of the 26 rows of `dataset` are not in the cache {folder}/cache" in str(caught.value)
    assert f"cache.folder={folder}/cache, which adds what is missing" in str(caught.value)


def test_rows_that_change_end_the_run(folder, tmp_path, monkeypatch):
    """The check before training saw others."""
    monkeypatch.setattr("torchtune_kd.training.teachers.check_cached_data", lambda *args: None)
    cfg = config(folder)
    cfg.dataset._component_ = "helpers.tiny.noisy_dataset"
    with pytest.raises(RunError, match="its dataset gives other tokens each time it is read"):
        run_in_process(cached(cfg, folder / "cache", output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"teacher_cache": "nowhere"}, "but nowhere is none: correct the path, or write the cache first"),
        ({"teacher_cache": 3}, "Expected `teacher_cache` to be a folder or null, got 3: change it"),
        ({"model.vocab_size": 3000}, "`model` and `teacher_cache` do not fit"),
        ({"teacher_model.num_heads": 8}, r"The teacher of the config is not that of the cache in .*num_heads"),
        ({"teacher_checkpointer.checkpoint_files": ["other.safetensors"]}, "weights of the teacher"),
        ({"tokenizer.path": "other"}, "was written with other files of the tokenizer"),
    ],
)
def test_a_cache_of_something_else(folder, tmp_path, change, sentence):
    cfg = OmegaConf.merge(config(folder), {"teacher_cache": str(folder / "cache"), "output_dir": str(tmp_path / "out")})
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    for key, value in change.items():
        if value == "other":
            text = (folder / "student" / "tokenizer.json").read_text()
            value = str(tmp_path / "tokenizer.json")
            (tmp_path / "tokenizer.json").write_text(text + " ")
        if value == ["other.safetensors"]:
            content = (folder / "teacher" / "model.safetensors").read_bytes()
            (folder / "teacher" / "other.safetensors").write_bytes(content[:-1] + b"\1")
        OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=sentence):
        run_in_process(cfg)


def test_weights_that_are_not_on_this_machine_are_not_compared(folder, tmp_path):
    cfg = OmegaConf.merge(config(folder), {"teacher_cache": str(folder / "cache"), "output_dir": str(tmp_path / "out")})
    cfg.teacher_checkpointer.checkpoint_dir = str(tmp_path / "elsewhere")
    run_in_process(cfg)
    assert torch.isfinite(torch.tensor(read_log(cfg.output_dir)[-1]["val_loss"]))
