"""Results are written and read back whole; what is no such file is said in one sentence."""

import json
import math

import pytest

from torchtune_kd.errors import UserError
from torchtune_kd.reports.results import SCHEMA, Result, append_results, read_results, to_lines
from torchtune_kd.storage.atomic import write_text

RESULT = Result(
    "student",
    "heldout",
    "kl",
    0.5,
    se=0.1,
    n=2,
    items=[0.4, 0.6],
    weights=[10, 12],
    reference="teacher",
    data="abc",
    cell="fkl-T2",
    coordinates={"kd_loss.temperature": 2, "kd_loss": "fkl"},
    seed=1,
    run="r",
    versions={"torch": "2.15"},
    machine="a “quiet” one",
)


def test_round_trip(tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    other = Result("teacher", "size", "parameters", 5)
    write_text(file, to_lines([RESULT]))
    append_results([other], file)
    assert read_results(file) == [RESULT, other]
    assert [read.name for read in read_results(file)] == ["fkl-T2", "teacher"]
    write_text(file, to_lines([other]))
    assert read_results(file) == [other] and list(file.parent.iterdir()) == [file]


def test_what_is_no_finite_number_is_null(tmp_path):
    file = tmp_path / "results.jsonl"
    write_text(file, to_lines([Result("a", "heldout", "perplexity", math.inf, items=[math.nan, 1.0])]))
    assert json.loads(file.read_text(encoding="utf-8"))["value"] is None
    (read,) = read_results(file)
    assert math.isnan(read.value) and read.items == [None, 1.0]


def test_a_last_line_that_was_cut_short_is_left_out_and_ended_by_the_next(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(to_lines([RESULT]) + to_lines([RESULT])[:40], encoding="utf-8")
    assert read_results(file) == [RESULT]
    append_results([RESULT], file)
    assert file.read_text(encoding="utf-8").splitlines()[2] == to_lines([RESULT]).strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (to_lines([RESULT])[:40] + "\n" + to_lines([RESULT]), r"Line 1 of .* is no JSON"),
        ("[1]\n", r"Line 1 of .* is no result"),
        ('{"loss": 1}\n', r"Line 1 of .* is no result"),
        (
            to_lines([RESULT]).replace(f'"schema":{SCHEMA}', f'"schema":{SCHEMA + 1}'),
            rf"schema {SCHEMA + 1}, .* {SCHEMA}",
        ),
        ('{"schema":1,"model":"a","value":1.0}\n', r"is of schema"),
        (to_lines([RESULT]).replace('"metric"', '"measure"'), r"is of schema"),
    ],
    ids=["broken", "list", "log", "newer", "incomplete", "renamed"],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "results.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_results(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"The results .*nothing\.jsonl cannot be read"):
        read_results(tmp_path / "nothing.jsonl")
