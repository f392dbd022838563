"""The number of steps follows the machine's pace, within bounds."""

import pytest
from omegaconf import OmegaConf
from tiny import dataset_section, make_config

from torchtune_kd.demo import budget


def test_a_faster_machine_takes_more_steps_and_ends_no_later():
    for pace in (budget.Pace(step=0.5, validation=0.5), budget.Pace(step=1.5, validation=1.5)):
        steps = budget.steps_that_fit(pace, elapsed=20, validation_batches=12)
        training = steps * pace.step + 12 * pace.validation
        assert budget.LEAST < steps < budget.MOST
        assert budget.SECONDS - 60 - pace.step - 20 < training < budget.SECONDS - 20


@pytest.mark.parametrize(("step", "expected"), [(60.0, budget.LEAST), (1e-3, budget.MOST)])
def test_no_machine_trains_next_to_nothing_or_for_ever(step, expected):
    assert budget.steps_that_fit(budget.Pace(step, step), elapsed=20, validation_batches=12) == expected


def test_pace_is_that_of_the_configured_step(tmp_path, monkeypatch):
    """With a clock that moves one second a call, each of the timed parts takes one; the step takes its microbatches."""
    monkeypatch.setattr(budget, "_VOCABULARY", 300)
    held_out = dataset_section(tmp_path / "rows.jsonl")
    cfg = make_config(tmp_path, gradient_accumulation_steps=2, batch_size=3, batch_size_val=5, dataset_val=held_out)
    shapes = []
    accumulate, evaluate = budget.kd.accumulate_gradients, budget.kd.evaluate

    def spy_step(student, teacher, step, *rest):
        shapes.append([tuple(batch["tokens"].shape) for batch in step])
        return accumulate(student, teacher, step, *rest)

    def spy_validation(student, teacher, batches, *rest):
        shapes.append([tuple(batch["tokens"].shape) for batch in batches])
        return evaluate(student, teacher, batches, *rest)

    monkeypatch.setattr(budget.kd, "accumulate_gradients", spy_step)
    monkeypatch.setattr(budget.kd, "evaluate", spy_validation)
    clock = iter(range(100))
    monkeypatch.setattr(budget.time, "perf_counter", lambda: float(next(clock)))
    assert budget.measure_pace(OmegaConf.create(cfg)) == budget.Pace(step=1.0, validation=1.0)
    length = cfg.tokenizer.max_seq_len - 1
    assert shapes == [[(3, length)] * 2] * 3 + [[(5, length)]]
