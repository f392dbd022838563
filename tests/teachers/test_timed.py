"""The clock of a teacher: its signals count, what is between them does not."""

import time

import pytest
import torch
from torch import nn

from helpers.tiny import make_config, read_log, run_in_process
from torchtune_kd.data.batches import Batch
from torchtune_kd.teachers.timed import TimedTeacher


class SlowTeacher:
    ended_for = None

    def signal(self, batch):
        time.sleep(0.02)
        return batch.tokens

    def end_step(self, student):
        self.ended_for = student


def test_signals_count_and_nothing_else():
    teacher, batch = SlowTeacher(), Batch(torch.ones(1, 2), torch.ones(1, 2))
    timed = TimedTeacher(teacher, torch.device("cpu"))
    assert timed.seconds() == 0
    assert timed.signal(batch) is batch.tokens
    once = timed.seconds()
    time.sleep(0.05)
    assert timed.seconds() == once >= 0.02
    timed.signal(batch)
    assert timed.seconds() >= once + 0.02
    timed.restart()
    assert timed.seconds() == 0
    student = nn.Identity()
    timed.end_step(student)
    assert teacher.ended_for is student


@pytest.mark.parametrize("kd_ratio", [0.5, 0.0])
def test_a_run_logs_the_share_of_its_teacher(tmp_path, kd_ratio):
    cfg = make_config(tmp_path, max_steps_per_epoch=2, epochs=1, kd_ratio=kd_ratio)
    run_in_process(cfg)
    shares = [line.get("teacher_time_share") for line in read_log(cfg.output_dir) if "lr" in line]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares) if kd_ratio else shares == [None, None]
