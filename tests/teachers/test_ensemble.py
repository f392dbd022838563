"""Several teachers: each as it would be alone, mixed."""

import pytest
from omegaconf import OmegaConf

from helpers.cached import write
from helpers.forked import ForkedRun
from helpers.resumable import CLOCK
from helpers.tiny import (
    STUDENT,
    TEACHER,
    checkpointer_section,
    make_config,
    model_section,
    read_log,
    run_in_process,
    write_checkpoint,
)  # fmt: skip
from torchtune_kd.errors import UserError

SUMMED = 1e-5  # of fp32 sums in another order, relative


def flat(folder, out, **more):
    return make_config(folder, output_dir=str(out), max_steps_per_epoch=2, **more)


def entry(folder, name, section):
    if not (folder / name).exists():
        write_checkpoint(folder / name, section, seed=sum(name.encode()))
    return {"name": name, "model": section, "checkpointer": checkpointer_section(folder / name)}


def with_teachers(cfg, entries, **more):
    less = {"teacher_model": None, "teacher_checkpointer": None, "teachers": entries}
    return OmegaConf.merge(cfg, less | more)


@pytest.fixture
def wide_and_narrow(tmp_path):
    flat(tmp_path, "")  # writes teacher and student
    wide = entry(tmp_path, "teacher", model_section("full", TEACHER, tied=False))
    narrow = entry(tmp_path, "narrow", model_section("full", STUDENT))
    return wide, narrow


def assert_same_log(one, other, relative=SUMMED):
    logs = [read_log(cfg.output_dir) for cfg in (one, other)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - CLOCK:
            assert ours[name] == pytest.approx(theirs[name], rel=relative, abs=relative), name


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_one_member_is_no_ensemble(tmp_path, wide_and_narrow, mix):
    """To the bit; and the same teacher twice is the teacher, but for rounding."""
    alone, listed = flat(tmp_path, tmp_path / "alone"), flat(tmp_path, tmp_path / "listed")
    run_in_process(alone)
    run_in_process(with_teachers(listed, [wide_and_narrow[0]], ensemble=mix))
    assert_same_log(alone, listed, relative=0)
    twice = flat(tmp_path, tmp_path / "twice")
    entries = [wide_and_narrow[0] | {"name": name, "share": share} for name, share in (("a", 0.25), ("b", 0.75))]
    run_in_process(with_teachers(twice, entries, ensemble=mix))
    assert_same_log(alone, twice)


def test_the_gradient_is_the_mean_of_the_members(tmp_path, wide_and_narrow):
    """Take an SGD step from each member and from the mixture; of forward KL at T = 1 it is Σ w_m (q - p_m)."""
    steps = {}
    optimizer = {"_component_": "torch.optim.SGD", "lr": 0.1}
    loss = {"_component_": "torchtune_kd.losses.ForwardKLLoss", "temperature": 1.0}
    shared = {"optimizer": optimizer, "kd_loss": loss, "kd_ratio": 1.0}
    entries = [member | {"share": share} for member, share in zip(wide_and_narrow, (0.3, 0.7), strict=True)]
    for name, teachers in {"both": entries, "wide": [wide_and_narrow[0]], "narrow": [wide_and_narrow[1]]}.items():
        cfg = flat(tmp_path, tmp_path / f"out {name}", **shared)
        cfg.max_steps_per_epoch = 1
        before = {}

        def remember(run, before=before):
            before |= {key: weight.detach().clone() for key, weight in run.student.named_parameters()}

        run = run_in_process(with_teachers(cfg, teachers), {"step": remember})
        steps[name] = {key: weight.detach() - before[key] for key, weight in run.student.named_parameters()}
    for key, both in steps["both"].items():
        expected = 0.3 * steps["wide"][key] + 0.7 * steps["narrow"][key]
        assert (both - expected).norm() <= 1e-4 * expected.norm() + 1e-9, key


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_a_member_may_come_from_a_cache(tmp_path, wide_and_narrow, mix):
    cfg = flat(tmp_path, "")
    write(cfg, tmp_path / "cache")
    live, from_cache = flat(tmp_path, tmp_path / "live"), flat(tmp_path, tmp_path / "cached")
    run_in_process(with_teachers(live, list(wide_and_narrow), ensemble=mix))
    cached = {"name": "teacher", "cache": str(tmp_path / "cache")}
    run_in_process(with_teachers(from_cache, [cached, wide_and_narrow[1]], ensemble=mix))
    assert_same_log(live, from_cache)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, wide_and_narrow):
    one, two = flat(tmp_path, tmp_path / "one"), flat(tmp_path, tmp_path / "two", batch_size=2)
    run_in_process(with_teachers(one, list(wide_and_narrow)))
    ForkedRun(with_teachers(two, list(wide_and_narrow)), 2).finish()
    assert_same_log(one, two)


def test_resuming_with_other_shares_is_refused(tmp_path, wide_and_narrow):
    cfg = flat(tmp_path, tmp_path / "out", save_every_n_steps=2)
    run_in_process(with_teachers(cfg, list(wide_and_narrow)))
    entries = [member | {"share": share} for member, share in zip(wide_and_narrow, (0.9, 0.1), strict=True)]
    again = with_teachers(cfg, entries, resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"`teachers\[0\]\.share` \(0\.5 then, 0\.9 now\)"):
        run_in_process(again)


MISTAKES = [
    ({"teachers": []}, "Expected `teachers` to be a list with an entry for each teacher"),
    ({"teachers": ["gpt"]}, r"Expected `teachers\[0\]` to be a section with a model, a cache or `self`, got 'gpt'"),
    ({"teachers": [{"name": "a"}]}, "either `model`, `cache` or `self`, but it has none of them"),
    ({"teachers": [{"cache": "x", "self": "ema"}]}, "but it has `cache` and `self`"),
    ({"teachers": [{"cach": "x"}]}, r"Unknown key `teachers\[0\]\.cach`: did you mean `cache`"),
    ({"teachers": [{"cache": "x", "share": 0.5}]}, "add up to 1, but they add up to 0.5"),
    ({"teachers": [{"cache": "x", "share": 0.0}, {"cache": "y", "share": 1.0}]}, "share` to be above 0, got 0"),
    ({"teachers": [{"self": "ema", "share": 0.5}, {"self": "base", "share": 0.5}]}, "is the student itself, as"),
    ({"teachers": [{"self": "me"}]}, r"Expected `teachers\[0\]\.self` to be base or ema, got 'me'"),
    ({"teachers": [{"self": "base", "decay": 0.9}]}, r"`teachers\[0\]\.decay` belongs to `self: ema`"),
    ({"teachers": [{"self": "ema", "decay": 1.0}]}, "decay` to be from 0 to below 1, got 1"),
    ({"teachers": [{"self": "ema", "head": "float8"}]}, "belongs to a teacher with `model`, but this one has `self`"),
    ({"teachers": [{"cache": "x", "tail": "zero"}]}, "tail` to be renormalise, got 'zero'"),
    ({"teachers": [{"self": "ema", "name": "a"}, {"cache": "x", "name": "a"}]}, "Two of `teachers` are called 'a'"),
    ({"teachers": [{"self": "ema"}], "ensemble": "votes"}, "Expected `ensemble` to be probabilities or logits"),
    ({"ensemble": "logits"}, "`ensemble` says how several `teachers` are mixed, but there are none"),
    ({"teachers": [{"self": "ema"}], "teacher_cache": "x"}, "`teachers` and `teacher_cache` both say who teaches"),
    ({"teachers": [{"self": "base"}]}, "`model` is a full-weight one"),
    (
        {"teachers": [{"cache": "x"}, {"cache": "y", "head": "float8"}], "ensemble": "logits"},
        r"adds up products with heads, which those of `teachers\[1\]\.head: float8` cannot be",
    ),
]


@pytest.mark.parametrize("change, sentence", MISTAKES, ids=[sentence[:40] for _, sentence in MISTAKES])
def test_mistakes(tmp_path, change, sentence):
    cfg = flat(tmp_path, tmp_path / "out")
    cfg = OmegaConf.merge(cfg, {"teacher_model": None, "teacher_checkpointer": None}, change)
    with pytest.raises(UserError, match=sentence):
        run_in_process(cfg)


def test_a_model_without_files_is_refused(tmp_path, wide_and_narrow):
    cfg = with_teachers(flat(tmp_path, tmp_path / "out"), [{"model": wide_and_narrow[0]["model"]}])
    with pytest.raises(UserError, match=r"Expected `teachers\[0\]\.checkpointer` to name the files"):
        run_in_process(cfg)


def test_several_need_hidden_states(tmp_path, wide_and_narrow):
    cfg = flat(tmp_path, tmp_path / "out")
    write(cfg, tmp_path / "cache", kind="top_k", dtype=None)
    entries = [{"cache": str(tmp_path / "cache")}, wide_and_narrow[0]]
    with pytest.raises(UserError, match=r"Several teachers give hidden states, but .* holds the 64 likeliest ids"):
        run_in_process(with_teachers(cfg, entries))
