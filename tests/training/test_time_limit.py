"""`max_minutes`: a run ends by the clock as if its epochs were done, its schedule at its end, all processes alike."""

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.forked import ForkedRun
from helpers.resumable import resumable_config
from helpers.tiny import dataset_section, make_config, read_log, run_in_process
from torchtune_kd.errors import UserError
from torchtune_kd.training.time_limit import LEAST_STEPS, TimeLimit

COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 1,
}


class Clock:
    """Stands still until it is told to move."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(TimeLimit, "clock", staticmethod(lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def go(clock, limit, seconds, most, validation=0.0, step=0):
    """Steps of the given lengths until the plan says that it is over; the plans."""
    limit.begin_validation()
    clock.now += validation
    limit.end_validation()
    plans = []
    for length in seconds:
        limit.begin_step()
        clock.now += length
        step += 1
        plans.append(limit.plan(step, most)[1])
        if plans[-1] == step:
            break
    return plans


@pytest.mark.parametrize("step", [0.5, 2.0, 7.0, 30.0])
def test_a_steady_machine_is_planned_at_once_and_ends_in_time(clock, step):
    limit = TimeLimit(240, began=clock.now - 20)  # loading took 20 s
    plans = go(clock, limit, [step] * 1000, most=600, validation=10)
    assert clock.now - 1000 + 20 + 10 <= 240  # what is left is the last validation
    assert clock.now - 1000 + 20 + 10 > 240 - 2 * step
    assert len(plans) == plans[-1]
    assert max(plans) - min(plans) <= 1


def test_a_machine_that_slows_down_still_ends_in_time(clock):
    limit = TimeLimit(240, began=clock.now)
    plans = go(clock, limit, [1.0] * 60 + [20.0] * 100, most=600, validation=10)
    assert clock.now - 1000 <= 240 and clock.now - 1000 + 10 > 240 - 2 * 20
    assert plans[0] > 200 and plans[-1] == len(plans) < 70


def test_a_machine_that_is_too_slow_takes_a_handful_of_steps(clock):
    assert go(clock, TimeLimit(240, began=clock.now), [90.0] * 100, most=600)[-1] == LEAST_STEPS
    assert go(clock, TimeLimit(1, began=clock.now - 50), [9.0] * 100, most=600) == [LEAST_STEPS] * LEAST_STEPS
    assert go(clock, TimeLimit(1, began=clock.now - 50), [9.0] * 100, most=3) == [3] * 3


def test_a_fast_machine_ends_with_its_data(clock):
    assert go(clock, TimeLimit(240, began=clock.now), [0.01] * 1000, most=600) == [600] * 600


def test_what_an_earlier_part_of_the_run_took_counts(clock):
    limit = TimeLimit(100, began=clock.now, spent=80)
    assert go(clock, limit, [3.0] * 100, most=600, step=40)[-1] == 46
    assert limit.plan(47, 600)[0] == pytest.approx(98)


def steps_of(cfg):
    return [line for line in read_log(cfg.output_dir) if "loss" in line]


@pytest.fixture
def slow_steps(clock):
    """The clock moves 10 s a step, and 3 s a validation: events of a run, see ``run_in_process``."""

    def pass_time(seconds):
        def listener(run):
            clock.now += seconds

        return listener

    return {"step": pass_time(10), "validation": pass_time(3)}


@pytest.mark.heavy
def test_the_run_ends_with_validation_export_and_the_schedules_end(tmp_path, slow_steps, capsys):
    cfg = make_config(tmp_path, epochs=5, lr_scheduler=COSINE, max_minutes=1.75)  # 6 steps an epoch, 10 in the time
    cfg.dataset_val = dataset_section(tmp_path / "rows.jsonl")
    run = run_in_process(cfg, on=slow_steps)
    steps = steps_of(cfg)
    assert [line["step"] for line in steps] == list(range(1, 10))  # 3 + 90 + 3 s; another would end at 106
    assert [line["step"] for line in read_log(cfg.output_dir) if "val_kl" in line] == [0, 9]
    assert sorted(path.name for path in Path(cfg.output_dir).glob("epoch_*")) == ["epoch_0", "epoch_4"]
    assert "The time is up: 1.75 minutes were enough for 9 steps." in capsys.readouterr().err

    # the schedule of 30 steps over 9: warm-up within the first, then the cosine at equal distances, 0 at the end
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * (30 * k / 9 - 1) / 29)) for k in range(1, 9)]
    assert [line["lr"] for line in steps] == pytest.approx([0.0, *expected], rel=0.02)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.heavy
def test_a_run_shorter_than_its_minutes_is_as_without_them(tmp_path, slow_steps):
    logs = []
    for name, minutes in (("without", None), ("with", 60)):
        cfg = make_config(tmp_path / name, epochs=2, lr_scheduler=COSINE, max_minutes=minutes)
        run_in_process(cfg, on=slow_steps)
        assert {path.name for path in Path(cfg.output_dir).glob("epoch_*")} == {"epoch_0", "epoch_1"}
        logs.append([(line["step"], line["loss"], line["lr"]) for line in steps_of(cfg)])
    assert len(logs[0]) == 12
    for with_minutes, without in zip(*reversed(logs), strict=True):
        assert with_minutes == pytest.approx(without)


@pytest.mark.heavy
def test_two_processes_end_after_the_same_step(tmp_path):
    """By the real clock: each rank has its own, and rank 0's decides."""
    cfg = make_config(tmp_path, epochs=400, lr_scheduler=COSINE, max_minutes=0.06)
    run = ForkedRun(cfg, 2)
    run.finish()
    steps = steps_of(cfg)
    assert LEAST_STEPS <= len(steps) < 1200
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["lr"] < 0.3 * max(line["lr"] for line in steps)
    assert (Path(cfg.output_dir) / "epoch_399").is_dir()


@pytest.mark.heavy
def test_a_resumed_run_has_what_is_left_of_its_minutes(tmp_path, slow_steps, clock, capsys):
    cfg = resumable_config(tmp_path, max_minutes=1.75)  # validates after 4 and 8 of 12 steps, saves each 2nd

    class Killed(Exception):
        pass

    def die_after_five(run):
        if run.global_step == 5:
            raise Killed

    with pytest.raises(Killed):
        run_in_process(cfg, on=slow_steps | {"update": die_after_five})
    clock.now += 5000  # while nothing runs, no time passes for it
    resumed = OmegaConf.merge(cfg, {"resume_from_checkpoint": True})
    run_in_process(resumed, on=slow_steps)
    steps = steps_of(cfg)
    # 43 s until step 4, then 3 s of validation that the checkpoint does not know of
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["lr"] for line in steps[3:]] == sorted((line["lr"] for line in steps[3:]), reverse=True)
    assert steps[-1]["lr"] < 0.2 * max(line["lr"] for line in steps)
    assert (Path(cfg.output_dir) / "epoch_1").is_dir()

    run_in_process(resumed, on=slow_steps)
    assert "The run is complete" in capsys.readouterr().err
    assert steps_of(cfg) == steps


@pytest.mark.parametrize("minutes", [0, -1, math.inf, math.nan])
def test_minutes_that_cannot_be(tmp_path, minutes):
    with pytest.raises(UserError, match="`max_minutes` to be a number above 0 or null"):
        run_in_process(make_config(tmp_path, max_minutes=minutes))


def test_a_schedule_that_cannot_be_stretched(tmp_path):
    scheduler = {"_component_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 10}
    with pytest.raises(UserError, match="CosineAnnealingLR, whose rates do not follow"):
        run_in_process(make_config(tmp_path, lr_scheduler=scheduler, max_minutes=1))
