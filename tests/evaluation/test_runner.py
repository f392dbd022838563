"""An evaluation from files to lines of results."""

import re

import pytest

from helpers.tiny import dataset_section, make_config, run_in_process
from torchtune_kd.evaluation import as_table, evaluate, read_request
from torchtune_kd.reports.results import read_results

pytestmark = pytest.mark.heavy
LATENCY = {"prompt_tokens": 8, "new_tokens": 3, "batch_sizes": [1, 2], "repeats": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA student of one epoch, and the losses that its last validation logged."""
    folder = tmp_path_factory.mktemp("evaluated")
    cfg = make_config(folder, "lora")
    cfg.dataset_val = dataset_section(folder / "rows.jsonl")
    return cfg, run_in_process(cfg).validation


@pytest.fixture(scope="module")
def results(trained):
    cfg, _ = trained
    cfg = cfg.copy()
    cfg.tasks, cfg.limit, cfg.latency = ["heldout", "cities"], None, LATENCY
    return cfg, evaluate(read_request(cfg))


def by_name(results, model):
    return {(line.task, line.metric): line for line in results if line.model == model}


def test_held_out_figures_are_those_of_the_run_s_validation(trained, results):
    """The merged export gives what the adapters gave: fp32, up to rounding."""
    _, logged = trained
    student = by_name(results[1], "student")
    for metric, name in (("loss", "val_class_loss"), ("kl", "val_kl"), ("acceptance_rate", "val_acceptance_rate")):
        assert student["heldout", metric].value == pytest.approx(logged[name], rel=1e-4), metric


def test_every_model_has_every_line(results):
    _, lines = results
    tasks = {"heldout", "cities", "size", "latency 1", "latency 2"}
    for model in ("untrained", "student", "teacher"):
        assert {task for task, _ in by_name(lines, model)} == tasks
    assert by_name(lines, "teacher")["heldout", "kl"].value == 0
    kl = by_name(lines, "student")["heldout", "kl"]
    assert kl.reference == "teacher" and re.search(r", reference \w{16}$", kl.data)  # its weights, not its name alone
    assert by_name(lines, "student")["heldout", "loss"].reference is None
    assert len(by_name(lines, "student")["cities", "acc"].items) > 300


def test_lines_say_where_they_come_from(results):
    _, lines = results
    line = lines[0]
    assert line.versions["torch"] and line.machine and len(line.config) == 64 and line.time.endswith("+00:00")
    assert len({one.data for one in lines if one.task == "cities"}) == 1  # of all models the same items


def test_sizes_count_the_table(results):
    _, lines = results
    size = by_name(lines, "untrained")
    assert size["size", "table_bytes"].value == 384 * 256 * 4  # tied: once
    assert by_name(lines, "teacher")["size", "table_bytes"].value == 2 * 384 * 256 * 4
    assert size["size", "weight_bytes"].value == 4 * size["size", "parameters"].value
    assert size["size", "file_bytes"].value == pytest.approx(size["size", "weight_bytes"].value, rel=0.01)  # merged


def test_latency_times_every_token(results):
    _, lines = results
    for batch_size in (1, 2):
        found = {
            metric: line
            for (task, metric), line in by_name(lines, "student").items()
            if task == f"latency {batch_size}"
        }
        assert found["prefill_seconds_p50"].n == 2 and found["decode_seconds_p50"].n == 6
        assert 0 < found["decode_seconds_p50"].value <= found["decode_seconds_p90"].value
        rate = batch_size / found["decode_seconds_p50"].value
        assert found["tokens_per_second"].value == pytest.approx(rate)


def test_results_are_added_to_the_file(results):
    cfg, lines = results
    request = read_request(cfg)
    kept = read_results(request.results)
    assert [line.value for line in kept[: len(lines)]] == [line.value for line in lines]
    cfg = cfg.copy()
    cfg.models, cfg.tasks, cfg.latency, cfg.items, cfg.limit = ["student"], ["cities"], None, False, 5
    more = evaluate(read_request(cfg))
    assert len(read_results(request.results)) == len(lines) + len(more)
    assert all(line.items is None for line in more) and more[0].n == 5


def test_the_table_has_a_column_for_each_model(results):
    _, lines = results
    table = as_table(lines, ["untrained", "student", "teacher"])
    head, _, *rows = table.splitlines()
    assert head.split() == ["untrained", "student", "teacher"]
    loss = next(row for row in rows if "next-token loss" in row)
    assert loss.count("±") == 3 and max(map(len, table.splitlines())) < 130
