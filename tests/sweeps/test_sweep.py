"""Sweeps by the real ``tune run``: killed, shared, with a cell that fails."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.sweep import evaluation, sweep_config
from torchtune_kd.reports.results import read_results

pytestmark = [pytest.mark.slow, pytest.mark.heavy]
CLOCK = {"seconds", "time", "load", "config", "commit"}


def start(cfg, *more):
    folder = Path(cfg.output_dir).parent
    path = folder / f"{Path(cfg.output_dir).name}_{os.getpid()}.yaml"
    OmegaConf.save(cfg, path)
    command = [str(Path(sys.executable).parent / "tune"), "run", "torchtune_kd/sweep", "--config"]
    return subprocess.Popen(
        [*command, str(path), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"{out[-2000:]}\n{err[-4000:]}"
    return out, err


def figures(cfg):
    """Every line of the results without what tells the time."""
    lines = read_results(Path(cfg.output_dir) / "results.jsonl")
    assert lines
    return [
        {name: value for name, value in vars(line).items() if name not in CLOCK}
        for line in lines
        if line.metric not in ("training_seconds", "teacher_seconds", "student_seconds", "peak_bytes")
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models, rows and the config of a sweep over them, in one folder for all processes of the tests."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "sweep"
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sweep_config(folder)


@pytest.fixture(scope="module")
def undisturbed(files):
    """The same sweep, done: by this process of the tests, or shared with another one that wants it, too."""
    finish(start(files))
    return files


def again(files, name):
    """The same sweep in another folder, over the same files."""
    cfg = files.copy()
    cfg.output_dir = str(Path(cfg.output_dir).parent / name)
    return cfg


def test_a_sweep_has_every_cell_with_every_seed(undisturbed):
    found = {(line["cell"], line["seed"]) for line in figures(undisturbed)}
    assert found == {(f"{loss}, T={t}", seed) for loss in ("FKL", "RKL") for t in (1, 2) for seed in (0, 1)}
    lines = [line for line in figures(undisturbed) if (line["cell"], line["seed"]) == ("RKL, T=2", 1)]
    training = {line["metric"]: line["value"] for line in lines if line["task"] == "training"}
    assert training["training_steps"] == 3 and training["training_tokens"] > 0
    assert training["student_flops"] > training["teacher_flops"] > 0
    assert {line["metric"] for line in lines if line["task"] == "validation"} >= {"kl", "class_loss"}
    assert not list(Path(undisturbed.output_dir).rglob("epoch_*"))  # keep: none
    curves = [json.loads(line) for line in (Path(undisturbed.output_dir) / "curves.jsonl").read_text().splitlines()]
    assert {curve["metric"] for curve in curves} >= {"val_kl", "val_class_loss"} and len(curves) == 8 * 4


def test_the_best_of_each_cell_is_evaluated_beside_the_models(files):
    """Two cells, each tuned over two rates; then nothing is left to do."""
    folder = Path(files.output_dir).parent
    cfg = again(files, "tuned")
    cfg.grid, cfg.cells = {"kd_loss.temperature": [1]}, {"sft": {"kd_ratio": 0.0}}
    cfg.seeds, cfg.tune, cfg.models, cfg.evaluate = [0], {"optimizer.lr": [0.9, 1e-4]}, ["teacher"], evaluation(folder)
    out, _ = finish(start(cfg, "slots=2"))
    assert "torchtune_kd/compare results=[" in out
    lines = figures(cfg)
    assert {(line["cell"], line["model"]) for line in lines} == {
        ("T=1", "student"), ("sft", "student"), ("teacher", "teacher"),
    }  # fmt: skip
    student = [line for line in lines if line["cell"] == "sft"]
    tasks = {line["task"].rpartition("/")[2] for line in student}
    assert tasks == {"training", "validation", "heldout", "questions.jsonl", "size"}
    tuned = read_results(Path(cfg.output_dir) / "tuned.jsonl")
    others = {line.cell: line.value for line in tuned if line.metric == "class_loss"}
    best = {
        line["cell"]: line["value"] for line in lines if (line["task"], line["metric"]) == ("validation", "class_loss")
    }
    assert set(others) == set(best) and all(best[cell] < others[cell] for cell in best)
    assert {line.coordinates["optimizer.lr"] for line in tuned} <= {0.9, 1e-4}
    runs = Path(cfg.output_dir) / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    finish(start(cfg))
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*")}


@pytest.mark.parametrize("programs_too", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_killed_in_the_middle_and_started_again_it_gives_the_same(undisturbed, programs_too):
    """SIGKILL to the sweep alone while a run trains, whose program lives on; or to that, too. No step is saved."""
    cfg = again(undisturbed, f"killed_{programs_too}")
    process = start(cfg)
    runs = Path(cfg.output_dir) / "runs"
    while len(list(runs.glob("*/trained.jsonl"))) < 2 or not logs_under_way(runs):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    for pid in programs_of(runs) if programs_too else []:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    finish(start(cfg))
    assert figures(cfg) == figures(undisturbed)


def logs_under_way(runs):
    """The logs of runs that have begun and are not trained."""
    return [log for log in runs.glob("*/run/logs/log_run.txt") if not (log.parents[2] / "trained.jsonl").exists()]


def programs_of(runs):
    """The processes that have a config of these runs on their command line."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{runs}/".encode() in file.read_bytes():
                yield int(file.parent.name)


@pytest.mark.nightly
def test_an_epoch_without_its_record_is_trained_again(files):
    """As after a SIGKILL between the export and the record."""
    cfg = small(files, "unrecorded")
    cfg.keep = "all"
    finish(start(cfg))
    expected, runs = figures(cfg), Path(cfg.output_dir) / "runs"
    for run in runs.iterdir():
        (run / "trained.jsonl").unlink()
        (run / "results.jsonl").unlink()
    finish(start(cfg))
    assert figures(cfg) == expected


def small(files, name):
    """Two cells with one seed."""
    cfg = again(files, name)
    cfg.grid, cfg.seeds = {"kd_loss.temperature": [1, 2]}, [0]
    return cfg


@pytest.mark.nightly  # half a minute; tests/recipes stop runs in the same way
def test_asked_to_stop_it_says_how_to_go_on(files):
    cfg = small(files, "stopped")
    process = start(cfg)
    runs = Path(cfg.output_dir) / "runs"
    while not list(runs.glob("*/run/logs/log_run.txt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 75)
    assert "stopped: SIGTERM ended the sweep after" in err and "same command" in err
    finish(start(cfg))
    assert {line["cell"] for line in figures(cfg)} == {"T=1", "T=2"}


def test_two_sweeps_on_one_folder_run_each_cell_once(files):
    cfg = small(files, "shared")
    both = [start(cfg), start(cfg)]
    for process in both:
        finish(process)
    assert [line["cell"] for line in figures(cfg) if line["metric"] == "training_steps"] == ["T=1", "T=2"]
    for log in (Path(cfg.output_dir) / "runs").glob("*/train.log"):
        assert log.read_text(errors="replace").count("Running KDRecipe with resolved config") == 1, log


def test_results_alone_let_another_machine_go_on(undisturbed):
    """With the files of the sweep and without the folders of its runs nothing is trained again."""
    cfg = again(undisturbed, "moved")
    folder = Path(cfg.output_dir)
    folder.mkdir()
    for name in ("results.jsonl", "curves.jsonl", "tuned.jsonl"):
        (folder / name).write_bytes((Path(undisturbed.output_dir) / name).read_bytes())
    finish(start(cfg))
    assert figures(cfg) == figures(undisturbed)
    assert not list((folder / "runs").glob("*/train.log"))


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(files):
    """A learning rate at which nothing is finite."""
    cfg = again(files, "failing")
    cfg.grid, cfg.seeds = {"kd_loss.temperature": [1]}, [0]
    cfg.cells = {"diverging": {"optimizer.lr": 1e30, "max_skipped_steps": 1, "max_steps_per_epoch": 6}}
    _, err = finish(start(cfg), 3)
    assert "warning: diverging, seed 0 failed with exit code 3 and the sweep goes on" in err
    assert {line["cell"] for line in figures(cfg)} == {"T=1"}
    (failed,) = (json.loads(line) for line in (Path(cfg.output_dir) / "failed.jsonl").read_text().splitlines())
    assert failed["name"] == "diverging, seed 0" and "finite" in failed["message"]
    finish(start(cfg), 3)  # it is not tried again
    (log,) = (Path(cfg.output_dir) / "runs" / failed["run"]).glob("train.log")
    assert log.read_text(errors="replace").count("Running KDRecipe with resolved config") == 1


def test_a_mistake_stops_before_the_second_cell(files):
    """A folder that is not there is no mistake in the keys, so that the first run finds it."""
    cfg = again(files, "mistaken")
    cfg.overrides = {"tokenizer.path": "/nope/tokenizer.json"}
    cfg.models, cfg.evaluate = ["teacher"], {"tasks": ["heldout"]}  # what no run trains does not count
    _, err = finish(start(cfg), 2)
    assert "cannot be run, and no run could before it" in err and "/nope" in err
    assert len(list((Path(cfg.output_dir) / "runs").iterdir())) == 1


def test_dry_run_says_what_it_takes(files):
    cfg = again(files, "dry")
    out, _ = finish(start(cfg, "dry_run=True"))
    assert "4 cells x 2 seeds, 1 point to tune over with the first seed: 8 runs, 8 of them open." in out
    assert "Each run: 3 steps, " in out and "FLOPs" in out and " minutes with 1 run at once" in out
    assert not Path(cfg.output_dir).exists()
