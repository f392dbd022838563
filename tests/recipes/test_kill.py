"""SIGKILL, the real one, to real processes: at twenty random moments, on one process and on two.

By day three of them on two processes: in a step, before a folder gets its name, and in an export. The others at night.
"""

import random
import time

import pytest
from omegaconf import OmegaConf

from helpers.forked import ForkedRun
from helpers.resumable import assert_same_run, resumable_config
from helpers.tiny import ROWS

# how often each begins in a run of 2 epochs of 4 steps, checkpoints every 3, validation every 2
TIMES = {"step": 8, "validation": 5, "save": 2, "rename": 4, "export": 2, "epoch": 2}
LAST = [("rename", 4), ("export", 2)]  # of the last export, which may be done before the signal arrives
BY_DAY = {0: "step", 3: "rename", 4: "export"}


def short_config(folder, name, size):
    return resumable_config(
        folder,
        output_dir=str(folder / name),
        rows=ROWS[:16],
        batch_size=4 // size,
        save_every_n_steps=3,
        run_val_every_n_steps=2,
        max_val_batches=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.nightly), 2])
@pytest.mark.parametrize(
    "by_day", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["three", "seventeen more"]
)
def test_killed_at_random_moments_and_resumed_each_time(tmp_path, by_day, size):
    """In a step, in a validation, in a save, before it gets its name, in an export, at the border of epochs."""
    undisturbed = short_config(tmp_path, "undisturbed", size)
    ForkedRun(undisturbed, size).finish()
    draw = random.Random(size)
    events = [*TIMES] * 3 + ["step", "save"]
    moments = [(event, draw.randint(1, TIMES[event]), draw.uniform(0, 0.05)) for event in events]
    assert len(moments) == 20 and {event for event, *_ in moments[:6]} == set(TIMES)
    assert {index: moments[index][0] for index in BY_DAY} == BY_DAY
    moments, killed = [moment for index, moment in enumerate(moments) if (index in BY_DAY) == by_day], 0
    for index, (event, count, delay) in enumerate(moments):
        cfg = short_config(tmp_path, f"killed_{index}", size)
        run = ForkedRun(cfg, size)
        assert run.wait_for(event, count), f"{event} {count}"
        time.sleep(delay)
        run.kill()
        killed += run.processes[0].exitcode == -9
        again = ForkedRun(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), size)
        again.finish()
        assert_same_run(cfg, undisturbed)
    assert killed >= len(moments) - sum((event, count) in LAST for event, count, _ in moments)
