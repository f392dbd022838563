"""The whole demo, with two steps and by a short clock: the real model, the real `tune run`, real text."""

import json
import math
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from helpers.assets import reference_text


def texts(file):
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [pytest.param([], id="live"), pytest.param(["--cached"], id="cached", marks=pytest.mark.nightly)]
)
def test_two_steps_from_beginning_to_end(tmp_path, options):
    (tmp_path / "own.txt").write_text(reference_text()[:60_000], encoding="utf-8")
    command = [sys.executable, "-m", "torchtune_kd.demo", "--output-dir", "out", "--steps", "2", "--text", "own.txt"]
    command += ["--strategy", "influence", *options]  # one forward pass; the measures have tests of their own
    overrides = [
        "tokenizer.max_seq_len=64",
        "batch_size=1",
        "kd_loss.temperature=1.25",
        "lr_scheduler.num_warmup_steps=0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))

    stages = ["teacher", "text", "student", *(["cache"] if options else []), "training", "measuring"]
    for number, stage in enumerate(stages, start=1):
        assert f"{number}/{len(stages)} {stage}" in done.stdout
    assert ("teacher_cache=" in " ".join(results["command"])) == ("cache" in results) == bool(options)
    assert "2/2 [" in done.stdout  # the recipe's progress bar
    assert "did not fall" in done.stdout or "fell from" in done.stdout

    assert results["settings"]["steps"] == 2 and results["settings"]["temperature"] == 1.25
    assert len(results["layers"]["kept"]) == 15 and len(results["layers"]["influence"]) == 30
    assert [record["step"] for record in results["validation"]] == [0, 1, 2]
    assert results["before"]["kl"] == results["validation"][0]["val_kl"] > 1
    assert results["after"]["kl"] == results["validation"][-1]["val_kl"] != results["before"]["kl"]
    assert f"{results['after']['kl']:.3g}" in done.stdout
    for moment in ("before", "after"):
        values = results[moment]
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
        assert 0 <= values["top1_agreement"] <= 1 and 0 <= values["acceptance_rate"] <= 1
        assert values["teacher_loss"] < 5 < values["loss"]  # a language model, and half of one
    assert (results["teacher"]["parameters"], results["student"]["parameters"]) == (134_515_008, 81_413_568)
    assert "134.5" in done.stdout and "81.4" in done.stdout
    assert len(results["completions"]) == 3 and "Paris" in results["completions"][2]["teacher"]
    assert all(results[role]["tokens_per_second"] > 0 for role in ("teacher", "student"))
    assert 1e8 < results["peak_memory_bytes"] < 6e9

    out = tmp_path / "out"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line)["text"] for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = "".join(
        json.loads(line)["text"] for line in (out / "val.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert len(rows) == 2 and not any(row in held_out for row in rows)
    trained = load_file(next((out / "run" / "epoch_0").glob("*.safetensors")))
    untrained = load_file(out / "student-untrained" / "model.safetensors")
    assert trained.keys() == untrained.keys()
    assert any((trained[name] != untrained[name]).any() for name in trained)

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.nightly  # a minute; test_two_steps_from_beginning_to_end walks the same stages
def test_by_the_clock(tmp_path):
    """Seventy seconds in place of the demo's own: training ends by them, with its schedule at its end."""
    (tmp_path / "own.txt").write_text(reference_text()[:60_000], encoding="utf-8")
    code = (
        "import sys\n"
        "from torchtune_kd.demo import __main__ as demo, budget\n"
        "demo.Deadline = lambda: budget.Deadline(70)\n"
        "sys.exit(demo.main(sys.argv[1:]))\n"
    )
    arguments = ["--output-dir", "out", "--text", "own.txt", "--strategy", "influence"]
    arguments += ["tokenizer.max_seq_len=64", "batch_size=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    steps, training = results["settings"]["steps"], results["training"]
    assert 5 <= steps == len(training) < 600
    assert f"After {steps} steps of 1 x 63 tokens, {steps * 63:,} in all" in done.stdout
    assert f"The time is up: {float(results['command'][5].partition('=')[2]):g} minutes" in done.stdout

    rates = [record["lr"] for record in training]
    assert rates[0] == 0 and max(rates) <= results["settings"]["learning_rate"]
    assert rates[-1] < 0.1 * max(rates)
    assert rates[rates.index(max(rates)) :] == sorted(rates[rates.index(max(rates)) :], reverse=True)
    assert [results["validation"][index]["step"] for index in (0, -1)] == [0, steps]
    assert ("cut short to end in time" in done.stdout) == bool(results["cut_short"])
