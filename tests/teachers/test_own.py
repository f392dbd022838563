"""The student as its own teacher."""

import pytest
import torch
from omegaconf import OmegaConf

from helpers.forked import ForkedRun
from helpers.resumable import CLOCK, interrupted_and_resumed, log_of, resumable_config, weights_of
from helpers.tiny import STUDENT, checkpointer_section, make_config, model_section, read_log, run_in_process
from torchtune_kd.teachers.own import AverageTeacher

CHECKPOINTED = {"enable_activation_checkpointing": True}


def own(cfg, **entry):
    less = {"teacher_model": None, "teacher_checkpointer": None, "teachers": [entry]}
    return OmegaConf.merge(cfg, less)


def assert_same_log(one, other, relative):
    for ours, theirs in zip(*(read_log(cfg.output_dir) for cfg in (one, other)), strict=True):
        for name in ours.keys() - CLOCK:
            assert ours[name] == pytest.approx(theirs[name], rel=relative, abs=1e-6), name


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_base_is_what_a_live_teacher_of_it_is(tmp_path, kind, accumulated):
    """In its adapters' dropout, too: there is none while it teaches."""
    more = {"gradient_accumulation_steps": accumulated, "batch_size": 4 // accumulated}
    cfg = make_config(tmp_path, kind, output_dir=str(tmp_path / "live"), **more)
    cfg.model.lora_dropout = 0.1
    cfg.teacher_model = model_section("full", STUDENT)
    cfg.teacher_checkpointer = checkpointer_section(tmp_path / "student")
    run_in_process(cfg)
    itself = own(OmegaConf.merge(cfg, {"output_dir": str(tmp_path / "own")}), self="base")
    run_in_process(itself)
    assert_same_log(cfg, itself, relative=1e-6)


class Oracle:
    """The average in fp64, by hand, from the weights after each step."""

    def __init__(self, decay, every):
        self.decay, self.every, self.steps, self.average = decay, every, 0, None

    def begin(self, run):
        if self.average is None:
            self.average = {n: p.detach().double() for n, p in run.student.decoder.named_parameters()}

    def follow(self, run):
        self.steps += 1
        if self.steps % self.every == 0:
            for name, parameter in run.student.decoder.named_parameters():
                self.average[name] = self.decay * self.average[name] + (1 - self.decay) * parameter.detach().double()


@pytest.mark.parametrize("every", [1, 2])
def test_the_average_is_that_of_the_formula(tmp_path, every):
    cfg = own(make_config(tmp_path), self="ema", decay=0.9, every_n_steps=every)
    oracle = Oracle(0.9, every)
    run = run_in_process(cfg, {"step": oracle.begin, "update": oracle.follow})
    kept = run.teacher.kept_state()
    assert oracle.steps == int(kept["steps"]) == 6
    for name, expected in oracle.average.items():
        assert torch.allclose(kept[f"average.{name}"].double(), expected, rtol=1e-5, atol=1e-7), name


def test_at_decay_0_it_teaches_what_it_is(tmp_path):
    """The average is the student itself after each step: no distance, and no gradient of the distillation."""
    cfg = own(make_config(tmp_path, kd_ratio=1.0), self="ema", decay=0.0)
    run_in_process(cfg)
    assert all(line["kl"] < 1e-5 for line in read_log(cfg.output_dir))


def test_an_average_of_bf16_weights_moves(tmp_path):
    """Below half a unit in the last place at a time: after n steps 1 - 0.999^n of the way."""
    student = torch.nn.Module()
    student.decoder = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        student.decoder.weight.fill_(1.0)
        teacher = AverageTeacher(student, 0.999, 1)
        student.decoder.weight.fill_(1.5)
    for _ in range(500):
        teacher.after_update(student)
    moved = (teacher.kept_state()["average.weight"] - 1.0) / 0.5
    assert torch.allclose(moved, torch.full((4, 4), 1 - 0.999**500), rtol=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("entry", [{"self": "ema", "decay": 0.8, "every_n_steps": 2}, {"self": "base"}], ids=str)
def test_resumed_it_is_the_same_run(tmp_path, kind, entry):
    if kind == "full" and entry["self"] == "base":
        pytest.skip("a full-weight student has no base")
    whole = own(resumable_config(tmp_path, kind, output_dir=str(tmp_path / "whole")), **entry)
    run_in_process(whole)
    part = OmegaConf.merge(whole, {"output_dir": str(tmp_path / "part")})
    interrupted_and_resumed(part)
    assert log_of(part) == log_of(whole)
    ours, theirs = weights_of(part), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "more",
    [{"enable_activation_checkpointing": True}, pytest.param({"compile": True}, marks=pytest.mark.nightly)],
    ids=str,
)
@pytest.mark.parametrize("entry", [{"self": "ema", "decay": 0.8}, {"self": "base"}], ids=str)
def test_checkpointed_or_compiled_it_is_the_same(tmp_path, entry, more):
    plain = own(make_config(tmp_path, "lora", output_dir=str(tmp_path / "plain"), max_steps_per_epoch=3), **entry)
    other = OmegaConf.merge(plain, {"output_dir": str(tmp_path / "other")}, more)
    run_in_process(plain)
    run_in_process(other)
    assert_same_log(plain, other, relative=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [{"self": "ema", "decay": 0.8}, {"self": "base"}], ids=str)
def test_two_processes_with_several_microbatches_and_layers_that_stay(tmp_path, entry):
    """Gradients are reduced in the last microbatch alone, and layers stay gathered until then."""
    one = own(make_config(tmp_path, "lora", output_dir=str(tmp_path / "one"), batch_size=8), **entry)
    run_in_process(one)
    more = {"batch_size": 2, "gradient_accumulation_steps": 2, "fsdp_reshard_after_forward": False}
    two = OmegaConf.merge(one, {"output_dir": str(tmp_path / "two"), "enable_activation_checkpointing": True}, more)
    ForkedRun(two, 2).finish()
    assert_same_log(one, two, relative=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("entry", [{"self": "ema", "decay": 0.8}, {"self": "base"}], ids=str)
def test_two_processes_give_the_numbers_of_one_and_resume_on_one(tmp_path, kind, entry):
    if kind == "full" and entry["self"] == "base":
        pytest.skip("a full-weight student has no base")
    one = own(make_config(tmp_path, kind, output_dir=str(tmp_path / "one"), epochs=2), **entry)
    run_in_process(one)
    two = OmegaConf.merge(one, {"output_dir": str(tmp_path / "two"), "batch_size": 2, "save_every_n_steps": 4})
    ForkedRun(two, 2).finish()
    assert_same_log(one, two, relative=1e-4)
    again = OmegaConf.merge(two, {"batch_size": 4, "resume_from_checkpoint": True, "epochs": 3})
    again.resume_despite_changes = True
    ForkedRun(again, 1).finish()
    longer = OmegaConf.merge(one, {"output_dir": str(tmp_path / "longer"), "epochs": 3})
    run_in_process(longer)
    assert_same_log(longer, again, relative=1e-4)


def test_the_full_weight_students_own_head_comes_back(tmp_path):
    """After each teacher's forward the weights are the student's again, to the bit."""
    cfg = own(make_config(tmp_path, max_steps_per_epoch=2), self="ema", decay=0.5)
    seen = []

    def remember(run):
        seen.append({name: parameter.detach().clone() for name, parameter in run.student.named_parameters()})

    run_in_process(cfg, {"step": remember, "gradients": remember})
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
