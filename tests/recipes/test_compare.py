"""``torchtune_kd/compare`` as a command: with and without a config, its table, its files, its sentences."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from helpers.synthetic_results import curves, grid
from torchtune_kd.recipes.compare import Request, read_request
from torchtune_kd.reports.results import to_lines
from torchtune_kd.training import UserError

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "compare.py"


@pytest.fixture
def results(tmp_path):
    file = tmp_path / "results.jsonl"
    lines = [line for line in grid(seeds=(0, 1), texts=12, questions=20) if line.metric in ("kl", "acc")]
    file.write_text(to_lines(lines))
    return file


def run(monkeypatch, capsys, *arguments):
    """The recipe's file as a program, in this process; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.mark.slow
def test_without_a_config(monkeypatch, capsys, tmp_path, results):
    half = tmp_path / "half.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True)
    results.write_text("".join(lines[:20]), encoding="utf-8")
    half.write_text("".join(lines[20:]), encoding="utf-8")
    (tmp_path / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curves(seeds=(0, 1))))
    out = tmp_path / "out"
    code, printed, said = run(
        monkeypatch, capsys, f"results=[{results},{half}]", "baseline=sft", f"output_dir={out}", "title=A sweep"
    )
    assert (code, said) == (0, "")
    assert printed.splitlines()[0].split("  ")[-1] == "cities acc" and f"{out}/report.html" in printed
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["sft", "fkl-T1", "fkl-T2"]
    assert {"report.md", "report.html", "comparison.json", "plots"} == {file.name for file in out.iterdir()}
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A sweep\n") and "plots/curves-val_kl.png" in text
    assert len(list((out / "plots").glob("forest-*.png"))) == 2


@pytest.mark.slow
def test_with_a_config(monkeypatch, capsys, tmp_path, results):
    config = tmp_path / "compare.yaml"
    config.write_text(f"results: {results}\nbaseline: sft\nmetrics: [kl]\noutput_dir: {tmp_path / 'a'}\n")
    code, printed, _ = run(monkeypatch, capsys, "--config", config, f"output_dir={tmp_path / 'b'}")
    assert code == 0 and "accuracy" not in printed
    assert (tmp_path / "b" / "report.md").exists() and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["baseline=sft"], "Expected results and a baseline: tune run torchtune_kd/compare results="),
        (["results=[{results}]"], "Expected results and a baseline"),
        (["results=[{results}]", "baseline=sftt"], "There is no baseline `sftt`: did you mean `sft`?"),
        (["results=[{results}x]", "baseline=sft"], "cannot be read"),
        (["results=[{results}]", "basline=sft"], "Unknown key `basline`: did you mean `baseline`?"),
        (["results=[{results}]", "baseline=3"], "Expected `baseline` to be str"),
        (["results=[{results}]", "baseline"], "key=value"),
        (["results=[{results}]", "baseline=sft", "output_dir={results}"], "cannot be read or written"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(monkeypatch, capsys, tmp_path, results, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, printed, said = run(monkeypatch, capsys, *(argument.format(results=results) for argument in arguments))
    assert code == 2 and printed == "" and said.startswith("error: ") and said.count("\n") == 1
    assert message in said
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_one_file_needs_no_brackets():
    assert read_request({"results": "a.jsonl", "baseline": "sft", "metrics": "kl"}) == Request(
        ["a.jsonl"], "sft", metrics=["kl"]
    )
    with pytest.raises(UserError, match="`metrics`"):
        read_request({"results": "a.jsonl", "baseline": "sft", "metrics": [3]})
