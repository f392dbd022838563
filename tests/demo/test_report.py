"""Tables, sentences and picture, read as a user would: nothing is claimed that the numbers do not carry."""

import dataclasses
import io
import math

import matplotlib.image
import pytest
from rich.console import Console

from torchtune_kd.demo import report
from torchtune_kd.evaluation.distance import Distance, closing, perplexity
from torchtune_kd.reports.curves import write_curves

BEFORE = Distance(loss=9.95, teacher_loss=2.94, kl=7.1234, top1_agreement=0.06, acceptance_rate=0.09)
AFTER = Distance(loss=3.33, teacher_loss=2.94, kl=0.8211, top1_agreement=0.571, acceptance_rate=0.66)
TEACHER = {"layers": 30, "parameters": 134_515_008, "checkpoint_bytes": 269_060_552, "tokens_per_second": 18.61}
STUDENT = {"layers": 15, "parameters": 81_413_568, "checkpoint_bytes": 162_847_400, "tokens_per_second": 30.72}


def shown(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def cells(table, label):
    (line,) = (line for line in shown(table).splitlines() if line.strip().startswith(label))
    return line.replace(label, "").split()


TRAINING = {"steps": 120, "rows_per_step": 2, "row_tokens": 255}


def test_distance_table():
    table = report.distance_table(BEFORE, AFTER, {"tokens": 8962, "validated": 8962}, TRAINING)
    assert "After 120 steps of 2 x 255 tokens, 61,200 in all" in shown(table)
    assert "Held-out text, 8,962 tokens, never trained on" in shown(table)
    assert cells(table, "perplexity") == ["20,952", "27.9", "18.9"]
    assert cells(table, "KL to the teacher, nats per token") == ["7.12", "0.821", "0"]
    assert cells(table, "same most likely token") == ["6.0%", "57.1%", "100%"]
    assert cells(table, "acceptance rate") == ["9.0%", "66.0%", "100%"]


def test_held_out_text_that_was_cut_is_said_to_be():
    table = report.distance_table(BEFORE, AFTER, {"tokens": 8962, "validated": 2040}, TRAINING)
    assert "Held-out text, 2,040 of 8,962 tokens, never trained on" in shown(table)


def test_size_table():
    table = report.size_table(TEACHER, STUDENT, {"prompt_tokens": 19, "generated_tokens": 64})
    assert cells(table, "layers") == ["15", "30"]
    assert cells(table, "parameters, millions") == ["81.4", "134.5"]
    assert cells(table, "checkpoint, MB") == ["163", "269"]
    assert cells(table, "tokens per second") == ["30.7", "18.6"]
    assert "64 tokens" in shown(table) and "prompt of 19" in shown(table)


def test_completion_table_shows_any_text_a_model_may_write():
    row = {"prompt": "A [bold]b", "teacher": "x\n\n  y", "untrained": "[/] [red", "trained": "z"}
    text = shown(report.completion_table([row]))
    assert "A [bold]b" in text and "x y" in text and "[/] [red" in text


@pytest.mark.parametrize("num_steps", [1, 40])
def test_curves_are_a_picture(tmp_path, num_steps):
    steps = [{"step": i, "loss": 9 / i, "kl": 7 / i, "top1_agreement": 1 - 1 / i} for i in range(1, num_steps + 1)]
    validations = [{"step": i, "val_kl": 7 / (i + 1), "val_top1_agreement": 0.5} for i in range(0, num_steps + 1, 10)]
    file = tmp_path / "curves.png"
    write_curves(file, steps, validations, "training loss (ForwardKLLoss, T = 2)")
    assert file.read_bytes().startswith(b"\x89PNG")
    picture = matplotlib.image.imread(file)
    assert picture.shape[0] > 300 and picture.shape[1] > 800
    assert picture[..., :3].std() > 0.01  # something is drawn


def test_a_closer_student_is_said_to_be_closer():
    kl, top1, speed = closing(BEFORE, AFTER, teacher_speed=20.0, student_speed=38.0)
    assert kl == "The student's KL to its teacher on held-out text fell from 7.12 to 0.821 nats per token."
    assert "at 57% of the places, 6% before" in top1
    assert speed == "It generates 1.9 times as many tokens per second (38, the teacher 20)."


def test_a_student_no_closer_is_not():
    kl, top1, speed = closing(AFTER, BEFORE, teacher_speed=20.0, student_speed=20.1)
    assert "did not fall: 0.821 nats per token before training, 7.12 after" in kl
    assert "did not rise: 57% before training, 6% after" in top1
    assert "does not generate faster" in speed


@pytest.mark.parametrize("change", [0.0, 1e-5, math.nan])
def test_no_claim_that_the_printed_digits_do_not_show(change):
    after = dataclasses.replace(BEFORE, kl=BEFORE.kl - change, top1_agreement=BEFORE.top1_agreement + change)
    kl, top1, _ = closing(BEFORE, after, 20.0, 20.0)
    assert "did not fall" in kl and "did not rise" in top1


def test_distance_comes_from_the_names_that_the_recipe_logs():
    record = {
        "step": 4,
        "val_loss": 1.0,
        "val_class_loss": 3.33,
        "val_teacher_class_loss": 2.94,
        "val_kl": 0.8211,
        "val_top1_agreement": 0.571,
        "val_acceptance_rate": 0.66,
    }
    distance = Distance.from_validation(record)
    assert distance == AFTER
    assert distance.perplexity == pytest.approx(math.exp(3.33))
    assert distance.to_dict()["teacher_perplexity"] == pytest.approx(math.exp(2.94))


def test_perplexity_of_a_model_gone_wrong_is_infinite():
    assert perplexity(1000.0) == math.inf
