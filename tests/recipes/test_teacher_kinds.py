"""Kill and stop runs with each kind of teacher, and hold the recipe to what it promises of them.

By day one SIGKILL a kind, at a moment drawn for it, and two stops by SIGTERM; more moments, every SIGTERM, and runs on
two processes at night.
"""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from helpers.forked import ForkedRun
from helpers.resumable import CLOCK, assert_same_run, resume, resumed, weights_of
from helpers.teacher_kinds import KINDS, TIMES, run_of
from helpers.tiny import read_log, run_in_process
from torchtune_kd.checkpoints.folders import step_folders

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that are killed: sums over several are in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of a kind on so many processes that nothing happened to, and the folder in which all of its kind lie."""
    runs = {}

    def run(kind, size=1):
        if (kind, size) not in runs:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            cfg = run_of(kind, folder, "undisturbed", size)
            if size == 1:
                run_in_process(cfg)
            else:
                ForkedRun(cfg, size).finish()
            runs[kind, size] = folder, cfg
        return runs[kind, size]

    return run


def by_night(values):
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


def moment_of(kind, number):
    """An event after about the first checkpoint, and the how many-th of it; of seven numbers each has another event."""
    draw = random.Random(kind)
    events = draw.sample(list(TIMES), len(TIMES))
    event = events[number % len(events)]
    return event, draw.randint((TIMES[event] + 1) // 2, TIMES[event])


def killed_at(moment, cfg, size=1, stands=True):
    """Send SIGKILL to all processes while the first one stands at an event, or has gone on from it."""
    run = ForkedRun(cfg, size, hold=moment if stands else None)
    assert run.wait_for(*moment), run.output()
    run.kill()
    assert run.processes[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("number", [0, *by_night([1, 2])])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_it_is_the_undisturbed_run(undisturbed, kind, number):
    folder, expected = undisturbed(kind)
    cfg = run_of(kind, folder, f"killed {number}")
    killed_at(moment_of(kind, number), cfg)
    resume(cfg)
    assert_same_run(cfg, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_killed_wherever_it_is_by_then(undisturbed, kind):
    """Twice: the run that goes on is killed, too."""
    folder, expected = undisturbed(kind)
    cfg = run_of(kind, folder, "killed between")
    killed_at(("microbatch", random.Random(kind).randint(7, 10)), cfg, stands=False)
    killed_at(("gradients", 2), resumed(cfg), stands=False)
    resume(cfg)
    assert_same_run(cfg, expected)


def stopped_in_step(step, cfg, size=1):
    """Send SIGTERM in the first of a step's microbatches, whose second is being read by then."""
    moment = ("microbatch", 2 * step - 1)
    run = ForkedRun(cfg, size, hold=moment)
    assert run.wait_for(*moment), run.output()
    run.send(signal.SIGTERM, ranks=[0])
    time.sleep(0.2)  # it has heard of the signal before it goes on
    run.wake()
    assert run.join() == [75] * size, run.output()
    newest = step_folders(Path(cfg.output_dir))[0]
    assert f"stopped: SIGTERM ended the run after step {step_of(newest)}; its checkpoint is {newest}" in run.output()
    assert step_of(newest) == step - 1
    assert all("Traceback" not in run.output(rank) for rank in range(size))


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("states in int8", "ema") else pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS],
)
def test_a_sigterm_gives_the_step_up_and_nothing_is_lost(undisturbed, kind):
    folder, expected = undisturbed(kind)
    cfg = run_of(kind, folder, "stopped")
    stopped_in_step(5, cfg)
    resume(cfg)
    assert_same_run(cfg, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_on_two_processes_too(undisturbed, kind):
    """Killed, then stopped by a signal to one of them."""
    folder, expected = undisturbed(kind, 2)
    killed = run_of(kind, folder, "killed", 2)
    killed_at(moment_of(kind, 4), killed, 2)
    ForkedRun(resumed(killed), 2).finish()
    assert_same_run(killed, expected)
    stopped = run_of(kind, folder, "stopped", 2)
    stopped_in_step(5, stopped, 2)
    ForkedRun(resumed(stopped), 2).finish()
    assert_same_run(stopped, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_goes_on_with_the_same_run(tmp_path, kind, sizes):
    """To rounding, without dropout, which every process draws for itself."""
    first, then = (run_of(kind, tmp_path, "moved", size, optimizer__lr=1e-4) for size in sizes)
    expected = run_of(kind, tmp_path, "expected", optimizer__lr=1e-4)
    for cfg in (first, then, expected):
        cfg.max_val_batches = None  # of each process
        if kind == "base":
            cfg.model.lora_dropout = 0.0
    run_in_process(expected)
    killed_at(("gradients", 5), first, sizes[0])
    assert step_folders(tmp_path / "moved")
    assert "Going on with" in ForkedRun(resumed(then), sizes[1]).finish()
    logs = [read_log(cfg.output_dir) for cfg in (then, expected)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for line, other in zip(*logs, strict=True):
        for name in other.keys() - CLOCK - {"tokens_seen"}:
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (line["step"], name)
    for name, weight in weights_of(expected).items():
        torch.testing.assert_close(weights_of(then)[name], weight, rtol=0, atol=1e-5)
