"""``examples/hinton``: its intervals, verdicts, tables and plots, and its command."""

import json
import math

import pytest
import torch

from helpers.hinton import load

pytest.importorskip("sklearn", reason="the extra evidence is not installed")
experiments, report, command = map(load, ("experiments", "report", "__main__"))
Claim, Table, Findings = report.Claim, report.Table, report.Findings


def test_intervals_are_those_of_student():
    low, high = report.interval(torch.tensor([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    low, high = report.interval(torch.tensor([1.0, 2.0, 3.0]), widening=2)
    assert (low, high) == pytest.approx((2 - 2 * 4.302653 / math.sqrt(3), 2 + 2 * 4.302653 / math.sqrt(3)))
    assert report.widening(10) == pytest.approx(math.sqrt(1 + 10 * 600 / 1197))


@pytest.mark.parametrize("expected", [-1, 1])
def test_verdicts_follow_the_interval(expected):
    far, near = torch.tensor([0.9, 1.0, 1.1]), torch.tensor([-1.0, 1.0, 0.3])
    cases = {"reproduced": expected * far, "opposite": -expected * far, "open": near}
    for verdict, values in cases.items():
        claim = Claim("§3", "a beats b", values, expected)
        assert claim.verdict() == verdict
        assert claim.sentence().startswith(f"{report.VERDICTS[verdict]}: a beats b ({values.mean():+.2f} points, 95 %")
    assert len(set(report.VERDICTS.values())) == 3


def test_the_summary_sorts_claims_and_says_which_outlast_wider_intervals():
    sure, hardly = torch.tensor([-1.0, -1.1, -0.9]), torch.tensor([-1.0, -1.6, -0.4])
    claims = [
        Claim("§1", "first", sure),
        Claim("§2", "second", hardly - 0.6),
        Claim("§3", "third", hardly),
        Claim("§4", "fourth", -sure),
    ]
    assert [claim.verdict() for claim in claims] == ["reproduced", "reproduced", "open", "opposite"]
    assert claims[1].verdict(report.widening(3)) == "open"
    text = report.summary(claims)
    assert "Reproduced (2 of 4):\n\n- first\n- second\n" in text
    assert "Not shown either way (1 of 4):\n\n- third\n" in text
    assert "Not reproduced, the opposite was found (1 of 4):\n\n- fourth\n" in text
    assert text.endswith("with which 1 of the claims are still reproduced:\n\n- first")
    assert report.summary(claims[2:]).endswith("with which 0 of the claims are still reproduced.")


def test_tables_hold_mean_and_standard_error():
    rows = {"a": {"x": torch.tensor([1.0, 3.0]), "d": torch.tensor([0.5, 0.5])}, "bb": {"x": "text", "d": ""}}
    assert Table("Title", "row", rows, ["d"]).markdown() == (
        "Title:\n\n"
        "| row | x           | d            |\n"
        "| --- | ----------- | ------------ |\n"
        "| a   | 2.00 ± 1.00 | +0.50 ± 0.00 |\n"
        "| bb  | text        |              |"
    )


# ------------------------------------------------------------------------------------------------ command


def found():
    """Return what experiments with a picture might have found."""
    values = torch.tensor([1.0, 2.0])
    per_temperature = {"sure": {"T = 1": values, "T = 4": -values}}
    shares = {f"{percent} %, of images": {"hard": values * percent, "soft": values} for percent in (3, 100)}
    names = (experiments.ERROR, experiments.FOUND, experiments.FOUND_RAISED)
    sets = [Table(f"Transfer set {i}", "targets", {"hard": dict.fromkeys(names, values)}) for i in "ab"]
    teachers = Table("Teachers", "teacher", {"sure": {"error": values}})
    claim = Claim("§3", "a beats b", values)
    return {
        "temperature": Findings("T", [teachers, Table("Students of 9, points", "teacher", per_temperature)], [claim]),
        "data": Findings("Few", [Table("Test error", "images", shares)], [claim]),
        "omitted": Findings("Omitted", sets, []),
    }


def test_the_command_writes_tables_figures_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "EXPERIMENTS", {name: lambda _, f=f: f for name, f in found().items()})
    command.main(["--seeds", "2", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "report.md").read_text()
    assert written.strip() in printed
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures["command"] == f"python -m examples.hinton --seeds 2 --output-dir {tmp_path / 'out'}"
    cell = figures["experiments"]["data"]["tables"][0]["rows"]["3 %, of images"]["hard"]
    assert cell == {"mean": 4.5, "standard_error": pytest.approx(1.5), "seeds": [3, 6]}
    claim = figures["experiments"]["temperature"]["claims"][0]
    assert claim["verdict"] == "open" and claim["interval_95"] == pytest.approx([1.5 - 6.3531, 1.5 + 6.3531], abs=1e-4)
    assert sorted(file.name for file in (tmp_path / "out").glob("*.png")) == [
        "data.png",
        "omitted.png",
        "temperature.png",
    ]
    from matplotlib import image

    for file in (tmp_path / "out").glob("*.png"):
        assert image.imread(file)[..., :3].std() > 0.05  # not blank


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--seeds", "1"], "expected --seeds of at least 2, since a standard error takes two, but got 1."),
        (["--seeds", "many"], "argument --seeds: invalid int value: 'many'"),
        (
            ["--only", "data,omited"],
            "expected --only to name some of temperature, data, omitted, ensemble, specialists, ",
        ),
        (["--output-dir", __file__], f"expected a folder to write into as --output-dir, but {__file__}: File exists."),
        (["--sed", "2", "3"], "unrecognized arguments: "),
    ],
)
def test_bad_arguments_end_in_a_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


def test_without_scikit_learn_a_sentence_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(SystemExit) as ended:
        command.main(["--output-dir", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(": pip install 'torchtune-kd[evidence]'.\n")
    assert not (tmp_path / "out").exists()
