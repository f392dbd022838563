"""A teacher for some of the datasets."""

import pytest
import torch
from omegaconf import OmegaConf

from helpers.cached import write
from helpers.forked import ForkedRun
from helpers.resumable import CLOCK
from helpers.tiny import (
    ROWS,
    STUDENT,
    TEACHER,
    checkpointer_section,
    dataset_section,
    make_config,
    model_section,
    read_log,
    run_in_process,
    write_checkpoint,
    write_rows,
)  # fmt: skip
from torchtune_kd.data.batches import Batch
from torchtune_kd.errors import UserError

SUMMED = 1e-5  # of fp32 sums in another order, relative
METRICS = ("loss", "class_loss", "kd_loss", "kl", "top1_agreement", "acceptance_rate")


@pytest.fixture
def two(tmp_path):
    """A wide teacher and a narrow one, and a config with two datasets."""

    def config(name, **more):
        cfg = make_config(tmp_path, output_dir=str(tmp_path / "out" / name), epochs=1, **more)
        halves = [write_rows(tmp_path / f"rows{half}.jsonl", ROWS[half::2]) for half in range(2)]
        cfg.dataset = [dataset_section(path) for path in halves]
        return cfg

    config("")
    write_checkpoint(tmp_path / "narrow", model_section("full", STUDENT), seed=9)
    entries = [
        {"name": "wide", "model": model_section("full", TEACHER, tied=False),
         "checkpointer": checkpointer_section(tmp_path / "teacher")},
        {"name": "narrow", "model": model_section("full", STUDENT),
         "checkpointer": checkpointer_section(tmp_path / "narrow")},
    ]  # fmt: skip
    return config, entries


def taught(cfg, entries, **more):
    less = {"teacher_model": None, "teacher_checkpointer": None, "teachers": entries}
    return OmegaConf.merge(cfg, less | more)


def only(cfg, half):
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    cfg.dataset = cfg.dataset[half]
    return cfg


def test_each_row_is_measured_against_its_teacher(two):
    """One step over all rows: the means are those of two steps over either half, weighted by their tokens."""
    config, entries = two
    both = config("both", batch_size=24)
    specialists = [entry | {"datasets": [half]} for half, entry in enumerate(entries)]
    run_in_process(taught(both, specialists))
    halves = []
    for half, entry in enumerate(entries):
        cfg = only(config(f"half{half}", batch_size=12), half)
        run_in_process(taught(cfg, [entry]))
        halves.append(read_log(cfg.output_dir)[0])
    found = read_log(both.output_dir)[0]
    tokens = [half["tokens_seen"] for half in halves]
    assert found["tokens_seen"] == sum(tokens)
    for name in METRICS:
        expected = sum(half[name] * count for half, count in zip(halves, tokens, strict=True)) / sum(tokens)
        assert found[name] == pytest.approx(expected, rel=SUMMED), name


def test_two_specialists_that_are_one_teacher_are_that_teacher(two):
    config, entries = two
    alone, doubled = config("alone", shuffle=True), config("doubled", shuffle=True)
    run_in_process(taught(alone, [entries[0]]))
    specialists = [entries[0] | {"name": name, "datasets": [half]} for half, name in enumerate("ab")]
    run_in_process(taught(doubled, specialists))
    for ours, theirs in zip(read_log(alone.output_dir), read_log(doubled.output_dir), strict=True):
        for name in ours.keys() - CLOCK:
            assert ours[name] == pytest.approx(theirs[name], rel=SUMMED, abs=SUMMED), name


def test_from_caches_of_their_own_rows(two, tmp_path):
    config, entries = two
    specialists = [entry | {"datasets": [half]} for half, entry in enumerate(entries)]
    live = config("live", shuffle=True)
    run_in_process(taught(live, specialists))
    caches = []
    for half, entry in enumerate(entries):
        cfg = only(config("writer"), half)
        cfg.teacher_model, cfg.teacher_checkpointer = entry["model"], entry["checkpointer"]
        write(cfg, tmp_path / f"cache{half}")
        caches.append({"name": entry["name"], "cache": str(tmp_path / f"cache{half}"), "datasets": [half]})
    cached = config("cached", shuffle=True)
    run_in_process(taught(cached, caches))
    for ours, theirs in zip(read_log(live.output_dir), read_log(cached.output_dir), strict=True):
        for name in ours.keys() - CLOCK:
            assert ours[name] == pytest.approx(theirs[name], rel=SUMMED, abs=SUMMED), name
    swapped = [cache | {"datasets": [1 - half]} for half, cache in enumerate(caches)]
    with pytest.raises(UserError, match="rows of `dataset` are not in the cache"):
        run_in_process(taught(config("swapped"), swapped))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(two):
    """Also where one of them has no row for a teacher whose weights it holds a part of."""
    config, entries = two
    specialists = [entry | {"datasets": [half]} for half, entry in enumerate(entries)]
    one, several = config("one", batch_size=2), config("several", batch_size=1)
    run_in_process(taught(one, specialists))
    ForkedRun(taught(several, specialists), 2).finish()
    for ours, theirs in zip(read_log(one.output_dir), read_log(several.output_dir), strict=True):
        for name in METRICS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_a_batch_without_a_row_for_a_teacher_is_one_without_a_label():
    tokens = torch.arange(6).view(2, 3)
    batch = Batch(tokens, tokens, lengths=[[3], [2]], parts=[1, 1])
    some, none = batch.rows([1], -100), batch.rows([], -100)
    assert some.tokens.tolist() == [[3, 4, 5]] and some.lengths == [[2]]
    assert none.tokens.shape == (1, 3) and (none.labels == -100).all()


@pytest.mark.parametrize(
    "datasets, more, sentence",
    [
        ([[0], [0, 1]], {}, r"`teachers\[0\]` and `teachers\[1\]` both teach the rows of `dataset\[0\]`"),
        ([[0], None], {}, r"Expected `teachers\[1\]\.datasets`, since other teachers have them"),
        ([[0], [2]], {}, "Expected a teacher for each of the 2 parts of `dataset`, but .* are 0, 2"),
        ([[0], ["one"]], {}, "to be a list of positions under `dataset`, counted from 0"),
        ([[0], [1]], {"share": 0.3}, "is for rows with several teachers, but each has one"),
        ([[0], [1]], {"validated": True}, "Expected a teacher for each of the 1 parts of `dataset_val`"),
    ],
)
def test_mistakes(two, tmp_path, datasets, more, sentence):
    config, entries = two
    cfg = config("mistake")
    if more.pop("validated", False):
        cfg.dataset_val = dataset_section(tmp_path / "rows0.jsonl")
    specialists = [entry | {"datasets": positions} for entry, positions in zip(entries, datasets, strict=True)]
    specialists[0] |= more
    with pytest.raises(UserError, match=sentence):
        run_in_process(taught(cfg, specialists))
