"""Tables of texts: a figure with an error is mean ± standard error over the seeds of the results in the repository."""

import json
import re
import statistics
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOSSES, TUNED, CACHED = "sweep_losses_and_temperatures", "sweep_tuned_or_not", "sweep_cached_teachers"
MEASURED = ["heldout loss", "heldout kl", "heldout top1_agreement", "heldout acceptance_rate", "cities acc"]
PERCENT = {"top1_agreement", "acceptance_rate", "acc"}
STORED = {
    "live teacher": "live",
    "last hidden states, bf16": "states",
    "last hidden states, int8": "int8",
    "64 likeliest ids and the mass of the rest": "top64",
    "64 likeliest ids, renormalised": "renormalised",
    "50 drawn ids": "drawn50",
}
IN_KOREAN = {
    "없음: 학생 옆에서 실행": "live",
    "마지막 은닉 상태, bf16": "states",
    "마지막 은닉 상태, int8": "int8",
    "상위 64개 토큰과 나머지의 확률 질량": "top64",
    "상위 64개 토큰, 다시 정규화(다른 도구들의 방식)": "renormalised",
    "뽑은 토큰 50개": "drawn50",
}
IN_README = {
    "nothing: it runs beside the student": "live",
    "last hidden states, bf16": "states",
    "last hidden states, int8": "int8",
    "64 likeliest ids and the mass of the rest": "top64",
    "64 likeliest ids, renormalised, as elsewhere": "renormalised",
    "50 drawn ids": "drawn50",
}


@cache
def values_of(sweep):
    """Return the values over seeds by cell and by task and metric."""
    values = defaultdict(list)
    for line in (ROOT / "benchmarks" / "reports" / sweep / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        values[result["cell"], f"{result['task']} {result['metric']}"].append(result["value"])
    return values


def row_of(file, label, n_columns):
    """Return the cells after the label, in the one row of so many columns that has it."""
    rows = [
        line[2:-2].split(" | ") for line in (ROOT / file).read_text().splitlines() if line.startswith(f"| {label} |")
    ]
    (row,) = [row for row in rows if len(row) == 1 + n_columns]
    return row[1:]


def check(figure, sweep, cell, measured):
    """Compare a figure with the results, in the digits that it has; where there are none it says why."""
    values = values_of(sweep).get((cell, measured))
    if values is None:
        assert figure in ("refused", "거부됨")
        return
    scale = 100 if measured.split()[1] in PERCENT else 1
    mean = scale * statistics.mean(values)
    error = scale * statistics.stdev(values) / len(values) ** 0.5
    digits = len(re.match(r"\d+\.(\d+)", figure)[1])
    assert figure.rstrip(" +−") == f"{mean:.{digits}f} ± {error:.{digits}f}"


@pytest.mark.parametrize("sweep", [LOSSES, TUNED])
def test_experiments(sweep):
    for cell in {cell for cell, _ in values_of(sweep)} - {"teacher", "untrained"}:
        _, *figures = row_of(
            "docs/experiments.md", cell.replace("-", " ") if sweep == TUNED else cell, 1 + len(MEASURED)
        )
        for figure, measured in zip(figures, MEASURED, strict=True):
            check(figure, sweep, cell, measured)


@pytest.mark.parametrize("label", STORED)
def test_cached_teachers(label):
    row = row_of("docs/teachers.md", label, 7)
    for at, figure in enumerate(row[1:]):
        check(
            figure,
            CACHED,
            f"{STORED[label]}-T{1 + at % 2}",
            ["heldout kl", "heldout loss", "heldout top1_agreement"][at // 2],
        )


@pytest.mark.parametrize("file, labels", [("README.md", IN_README), ("README.ko.md", IN_KOREAN)])
def test_cached_teachers_in_readmes(file, labels):
    for label, cell in labels.items():
        _, *figures = row_of(file, label, 3)
        for temperature, figure in enumerate(figures, 1):
            check(figure, CACHED, f"{cell}-T{temperature}", "heldout kl")
