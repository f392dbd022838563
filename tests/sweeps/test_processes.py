"""Times out of the log of a run."""

from dataclasses import dataclass
from pathlib import Path

from torchtune_kd.sweeps.processes import step_seconds, training_lines
from torchtune_kd.sweeps.runs import LOG


def test_seconds_follow_from_tokens_and_their_rate():
    """Two devices; the second step has no valid token, so that its rate is 0."""
    steps = [
        {"tokens_seen": 100, "tokens_per_second_per_gpu": 25.0},
        {"tokens_seen": 100, "tokens_per_second_per_gpu": 0.0},
        {"tokens_seen": 140, "tokens_per_second_per_gpu": 10.0},
    ]
    assert step_seconds(steps, 2) == [2.0, 0.0, 2.0]


@dataclass
class LoggedRun:
    """A run of which there is only a log."""

    output: Path

    def result(self, task, metric, value):
        return metric, value


def test_the_seconds_of_teacher_and_student_are_those_of_the_run(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / LOG).write_text(
        "Step 1 | loss:2.0 tokens_per_second_per_gpu:25.0 tokens_seen:100 teacher_time_share:0.25 \n"
        "Step 2 | loss:1.0 tokens_per_second_per_gpu:50.0 tokens_seen:300 teacher_time_share:0.5 \n"
    )
    found = dict(training_lines(LoggedRun(tmp_path), 1, 0))
    assert (found["training_seconds"], found["teacher_seconds"], found["student_seconds"]) == (8.0, 3.0, 5.0)
