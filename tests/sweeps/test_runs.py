"""Runs: who they are, which count, and what is wrong with one before any is started."""

import pytest

from helpers.sweep import evaluation, sweep_config
from torchtune_kd.errors import UserError
from torchtune_kd.reports.results import to_lines
from torchtune_kd.storage.atomic import write_text
from torchtune_kd.sweeps.request import read_request
from torchtune_kd.sweeps.runs import chosen_runs, plan_runs


def planned(cfg):
    return plan_runs(read_request(cfg))


def trained(run, loss):
    write_text(run.trained_file, to_lines([run.result("validation", "class_loss", loss)]))


def test_all_cells_of_a_seed_come_before_the_next(tmp_path):
    seeds = planned(sweep_config(tmp_path))
    assert [[str(run) for run in runs] for runs in seeds] == [
        [f"{loss}, T={temperature}, seed {seed}" for loss in ("FKL", "RKL") for temperature in (1, 2)]
        for seed in (0, 1)
    ]
    assert len({run.id for runs in seeds for run in runs}) == 8


def test_a_run_is_its_config_and_its_files_not_its_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (planned(sweep_config(tmp_path / name))[0][0] for name in "ab")
    assert one.id == other.id and one.folder != other.folder  # the same models and rows in other folders
    longer = sweep_config(tmp_path / "a", overrides={"max_steps_per_epoch": 4})
    assert planned(longer)[0][0].id != one.id
    quieter = sweep_config(tmp_path / "a", overrides={"max_steps_per_epoch": 3, "batch_size_val": 2})
    assert planned(quieter)[0][0].id == one.id
    for name in ("rows.jsonl", "student/tokenizer.json", "teacher/model.safetensors"):
        file = tmp_path / "a" / name
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert planned(sweep_config(tmp_path / "a"))[0][0].id != one.id, name
        file.write_bytes(before)


def test_another_evaluation_has_results_of_its_own(tmp_path):
    one = planned(sweep_config(tmp_path, evaluate=evaluation(tmp_path)))[0][0]
    (tmp_path / "questions.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')
    other = planned(sweep_config(tmp_path, evaluate=evaluation(tmp_path)))[0][0]
    assert one.id == other.id and one.results_file != other.results_file


def test_the_best_point_of_the_first_seed_counts_with_every_seed(tmp_path):
    cfg = sweep_config(tmp_path, tune={"optimizer.lr": [1e-3, 1e-4]}, grid={"kd_loss.temperature": [1, 2]})
    request = read_request(cfg)
    seeds = plan_runs(request)
    slow, fast, *others = seeds[0]
    trained(slow, 3.0)
    assert chosen_runs(request, seeds) == set()  # the other point is open
    trained(fast, 2.0)
    chosen = [str(run) for runs in seeds for run in runs if run.id in chosen_runs(request, seeds)]
    assert chosen == ["T=1, lr=0.0001, seed 0", "T=1, lr=0.0001, seed 1"]
    others[0].folder.mkdir(parents=True)
    others[0].write_failure(3, "no memory")
    trained(others[1], 9.0)
    assert len(chosen_runs(request, seeds)) == 4  # what failed does not hold its cell up


def test_a_point_that_diverged_is_not_the_best(tmp_path):
    one_cell = {"kd_loss.temperature": [1]}
    request = read_request(sweep_config(tmp_path, tune={"optimizer.lr": [0.9, 1e-4]}, grid=one_cell))
    seeds = plan_runs(request)
    trained(seeds[0][0], float("nan"))
    trained(seeds[0][1], 2.0)
    chosen = chosen_runs(request, seeds)
    assert {run.point["optimizer.lr"] for runs in seeds for run in runs if run.id in chosen} == {1e-4}


def test_a_metric_that_no_validation_logs_is_named(tmp_path):
    request = read_request(sweep_config(tmp_path, tune={"optimizer.lr": [1e-3]}, tune_by="perplexity"))
    seeds = plan_runs(request)
    trained(seeds[0][0], 1.0)
    with pytest.raises(UserError, match=r"`tune_by: perplexity` is no validation metric .* class_loss"):
        chosen_runs(request, seeds)


@pytest.mark.parametrize(
    "keys, said",
    [
        (
            {"grid": {"kd_loss.temprature": [1]}},
            r"The cell 'temprature=1' cannot be run: Unknown key `kd_loss.temprature`",
        ),
        ({"grid": {"optimiser": [1]}}, "did you mean `optimizer`"),
        (
            {"cells": {"sft": {"kd_ratio": 2.0}}},
            "The cell 'sft' cannot be run: Expected `kd_ratio` to be between 0 and 1",
        ),
    ],
)
def test_a_key_that_the_recipe_does_not_read_is_found_before_any_run(tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        planned(sweep_config(tmp_path, **keys))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"gird": {}}, "did you mean `grid`"),
        ({"output_dir": None}, "Expected the key `output_dir`"),
        ({"run_config": "torchtune_kd/nope"}, "no file and no config"),
        ({"run_recipe": "full_finetune"}, "one of torchtune_kd/kd_single_device"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"seeds": []}, "different whole numbers"),
        ({"slots": 0}, "1 or more, or cuda:auto"),
        ({"devices_per_run": 2}, "needs `run_recipe: torchtune_kd/kd_distributed`"),
        ({"keep": "some"}, "one of none, all"),
        ({"tune_by": "top1_agreement"}, "of which less is better"),
        ({"tune": {"optimizer.lr": 3}}, "under `tune` for `optimizer.lr`"),
        ({"models": ["teachers"]}, "some of untrained, teacher"),
        ({"models": ["teacher"]}, "`evaluate`, which is empty"),
        (
            {"cells": {"teacher": {}}, "models": ["teacher"], "evaluate": {"tasks": []}},
            "'teacher' is also one of `models`",
        ),
        ({"cells": {"sft": 3}}, "map dotted keys to values"),
        ({"exclude": [3]}, "a list of mappings"),
    ],
)
def test_keys_that_cannot_be_are_one_sentence(tmp_path, keys, said):
    cfg = sweep_config(tmp_path, **keys)
    with pytest.raises(UserError, match=said):
        read_request(cfg)
