"""Runs from stored log-probabilities."""

import pytest
from omegaconf import OmegaConf

from helpers.cached import cache_config, cached, documents_of, write
from helpers.forked import ForkedRun
from helpers.resumable import CLOCK, interrupted_and_resumed, log_of, resumable_config
from helpers.tiny import ROWS, VOCAB, dataset_section, make_config, read_log, run_in_process, write_rows
from torchtune_kd.errors import UserError

HALF = 2**-9  # of log-probabilities in fp16, relative
BOUNDED = {"kl", "acceptance_rate", "val_kl", "val_acceptance_rate", "val_teacher_class_loss"}


def config(folder, out="", **more):
    cfg = make_config(folder, output_dir=str(out), max_steps_per_epoch=2, **more)
    cfg.dataset_val = dataset_section(write_rows(folder / "val.jsonl", ROWS[5:12]))
    return cfg


def top_k(cfg, folder, k, **more):
    return write(cfg, folder, kind="top_k", dtype=None, k=k, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of nearly all ids, and one of 8, with the mass of the rest at T = 1 and 2."""
    folder = tmp_path_factory.mktemp("sparse")
    for k in (VOCAB - 1, 8):
        top_k(config(folder), folder / f"top{k}", k, temperatures=[1, 2])
    write(config(folder), folder / "drawn", kind="sampled", dtype=None, samples=40)
    return folder


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", ["ForwardKLLoss", "ReverseKLLoss", "JSDLoss", "SkewForwardKLLoss", "TVDLoss"])
def test_of_all_ids_it_is_the_live_teacher(folder, tmp_path, loss, temperature):
    """But for fp16; bounds are then what they bound."""
    section = {"_component_": f"torchtune_kd.losses.{loss}", "temperature": temperature}
    live = config(folder, tmp_path / "live", kd_loss=section)
    run_in_process(live)
    from_cache = cached(live, folder / f"top{VOCAB - 1}", output_dir=str(tmp_path / "cached"))
    run_in_process(from_cache)
    for ours, theirs in zip(read_log(live.output_dir), read_log(from_cache.output_dir), strict=True):
        for name in ours.keys() - CLOCK:
            other = f"{name}_cells" if name in BOUNDED else name
            assert theirs[other] == pytest.approx(ours[name], rel=HALF, abs=HALF), name


def test_of_few_ids_the_bounds_hold(folder, tmp_path):
    live = config(folder, tmp_path / "live", kd_ratio=1.0)
    run_in_process(live)
    from_cache = cached(live, folder / "top8", output_dir=str(tmp_path / "cached"))
    run_in_process(from_cache)
    ours, theirs = (read_log(cfg.output_dir)[0] for cfg in (live, from_cache))  # before training
    assert theirs["val_kl_cells"] < ours["val_kl"] and theirs["val_loss"] < ours["val_loss"]
    assert theirs["val_acceptance_rate_cells"] > ours["val_acceptance_rate"]
    # the label is always stored
    assert theirs["val_teacher_class_loss_cells"] == pytest.approx(ours["val_teacher_class_loss"], rel=HALF)
    assert theirs["val_class_loss"] == pytest.approx(ours["val_class_loss"])
    assert "val_kl" not in theirs


def test_renormalised_it_is_another_loss_and_says_no_bounds(folder, tmp_path):
    kept = cached(config(folder, tmp_path / "kept"), folder / "top8")
    run_in_process(kept)
    cfg = cached(config(folder, tmp_path / "out"), folder / "top8", teacher_tail="renormalise")
    run_in_process(cfg)
    with_tail, without = read_log(kept.output_dir)[0], read_log(cfg.output_dir)[0]
    assert "val_kl_cells" not in without and without["val_loss"] != pytest.approx(with_tail["val_loss"], rel=1e-3)


def test_drawn_ids(folder, tmp_path):
    """40 draws a token estimate the KL; the log has what is defined alone."""
    section = {"_component_": "torchtune_kd.losses.ForwardKLLoss", "temperature": 1.0}
    live = config(folder, tmp_path / "live", kd_loss=section)
    run_in_process(live)
    from_cache = cached(live, folder / "drawn", output_dir=str(tmp_path / "cached"))
    run_in_process(from_cache)
    ours, theirs = (read_log(cfg.output_dir)[0] for cfg in (live, from_cache))
    assert theirs["val_kd_loss"] == pytest.approx(ours["val_kd_loss"], rel=0.1)
    assert theirs.keys() == {
        "step", "val_loss", "val_class_loss", "val_kd_loss", "val_student_entropy", "val_teacher_entropy",
    }  # fmt: skip
    assert theirs["val_teacher_entropy"] == pytest.approx(ours["val_teacher_entropy"], rel=1e-5)


@pytest.mark.slow
def test_drawn_ids_are_the_same_on_any_number_of_processes(folder, tmp_path):
    keys = {"kind": "sampled", "dtype": None, "samples": 40, "tokens_per_batch": 48, "shard_size": 1}
    write(config(folder), tmp_path / "one", **keys)
    ForkedRun(cache_config(config(folder, tmp_path / "out"), tmp_path / "two", **keys), 2, CACHE).finish()
    assert documents_of(tmp_path / "one") == documents_of(tmp_path / "two")


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_resumed_it_is_the_same_run(tmp_path, kind):
    cfg = resumable_config(tmp_path, "lora", output_dir=str(tmp_path / "whole"))
    cfg.kd_loss.temperature = 1.0
    write(cfg, tmp_path / "cache", kind=kind, dtype=None)
    whole = cached(cfg, tmp_path / "cache")
    run_in_process(whole)
    part = cached(cfg, tmp_path / "cache", output_dir=str(tmp_path / "part"))
    interrupted_and_resumed(part)
    assert log_of(part) == log_of(whole)


@pytest.mark.parametrize(
    "cache, change, sentence",
    [
        ("top8", {"kd_loss.temperature": 4.0}, "at these temperatures: 1, 2, but `kd_loss.temperature` is 4"),
        ("drawn", {"kd_loss.temperature": 2.0}, "only forward KL at temperature 1 is unbiased"),
        ("drawn", {"kd_loss._component_": "torchtune_kd.losses.JSDLoss"}, "only forward KL at temperature 1"),
        ("drawn", {"teacher_tail": "renormalise"}, "is for caches of the likeliest ids, but .* holds 40 drawn ids"),
        ("top8", {"teacher_tail": "zero"}, "Expected `teacher_tail` to be renormalise"),
        ("top8", {"teacher_head": "float8"}, "needs hidden states, but the cache in .* holds the 8 likeliest ids"),
        ("top8", {"keep_best": "val_kl"}, "one of val_loss, .*val_kl_cells, .*got val_kl"),
        (
            "top8",
            {"teacher_tail": "renormalise", "kd_loss._component_": "torchtune_kd.losses.ReverseKLLoss"},
            "needs the mass of the rest",
        ),
    ],
)
def test_what_is_not_defined_is_refused(folder, tmp_path, cache, change, sentence):
    cfg = cached(config(folder, tmp_path / "out"), folder / cache)
    cfg.kd_loss.temperature = 1.0
    for key, value in change.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(UserError, match=sentence):
        run_in_process(cfg)


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"kind": "top_k", "k": VOCAB}, f"Expected `cache.k` below the teacher's {VOCAB} ids, got {VOCAB}"),
        ({"kind": "top_k", "k": 0}, "Expected `cache.k` to be at least 1, got 0"),
        ({"kind": "sampled", "samples": 256}, "Expected `cache.samples` to be from 1 to 255, got 256"),
        ({"kind": "sampled", "k": 3}, "`cache.k` belongs to `cache.kind: top_k`"),
        ({"kind": "top_k", "temperatures": ["warm"]}, "Expected `cache.temperatures` to be a list of numbers"),
        ({"temperatures": [1.0]}, "`cache.temperatures` belongs to `cache.kind: top_k`"),
    ],
)
def test_mistakes_in_the_keys(folder, tmp_path, keys, sentence):
    with pytest.raises(UserError) as caught:
        write(config(folder), tmp_path / "cache", **({"dtype": None} | keys))
    assert sentence in str(caught.value)


CACHE = "torchtune_kd.recipes.cache_teacher"
