"""Check what a comparison says, computed by hand; what it refuses; what it does not keep to itself."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from helpers.synthetic_results import grid, result
from torchtune_kd.errors import UserError
from torchtune_kd.reports.comparison import compare, write_comparison
from torchtune_kd.reports.notes import read_failures

N = 40


def cell(name, shift, *, seeds=(0, 1, 2), noise=0.01, metric="kl", items=True, **fields):
    """One model: every item is ``shift`` above those of a fixed draw, and every seed a little beside it."""
    random = np.random.default_rng(sum(map(ord, name)))
    base = np.random.default_rng(0).gamma(4, 0.2, N)
    lines = []
    for place, seed in enumerate(seeds):
        values = base + shift + noise * (place - (len(seeds) - 1) / 2) + random.normal(0, 0.02, N)
        line = result(name, "heldout", metric, values, seed=seed, run=f"{name}-{seed}", **fields)
        lines.append(line if items else replace(line, items=None))
    return lines


def row_of(comparison, name, table=0):
    (row,) = (row for row in comparison.tables[table].rows if row.name == name)
    return row


def test_numbers_are_those_of_the_definitions():
    lines = [*cell("sft", 0.0), *cell("kd", -0.1), *cell("untrained", 0.8, seeds=(None,))]
    comparison = compare(lines, "sft")
    (table,) = comparison.tables
    kd, sft = row_of(comparison, "kd"), row_of(comparison, "sft")
    values = [line.value for line in lines if line.name == "kd"]
    assert kd.mean == pytest.approx(np.mean(values)) and kd.se_seeds == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    items = {name: np.mean([line.items for line in lines if line.name == name], axis=0) for name in ("kd", "sft")}
    assert kd.se_items == pytest.approx(np.std(items["kd"], ddof=1) / N**0.5)
    paired = items["kd"] - items["sft"]
    difference = kd.difference
    assert difference.value == pytest.approx(kd.mean - sft.mean) == pytest.approx(paired.mean())
    assert difference.items.se == pytest.approx(np.std(paired, ddof=1) / N**0.5)
    assert difference.items.se < kd.se_items / 5  # what pairing is for
    assert difference.resampled == pytest.approx((difference.items.low, difference.items.high), abs=difference.items.se)
    variances = [np.var([line.value for line in lines if line.name == name], ddof=1) for name in ("sft", "kd")]
    assert (table.seed_sd, table.seed_dof) == (pytest.approx(np.mean(variances) ** 0.5), 4)
    assert difference.seeds.se == pytest.approx(table.seed_sd * (2 / 3) ** 0.5)
    untrained = row_of(comparison, "untrained")
    assert untrained.seeds == [None] and untrained.se_seeds is None
    assert untrained.difference.seeds.se == pytest.approx(table.seed_sd * (1 / 3) ** 0.5)
    assert difference.p == max(difference.items.p, difference.seeds.p)
    smaller, larger = sorted((difference.p, untrained.difference.p))
    assert sorted((difference.adjusted, untrained.difference.adjusted)) == pytest.approx(
        [min(1, 2 * smaller), max(min(1, 2 * smaller), larger)]
    )
    assert sft.difference is None


def test_the_baseline_comes_first_and_the_others_as_they_came():
    lines = [*cell("rkl", 0), *cell("sft", 0), *cell("kd", 0)]
    assert [row.name for row in compare(lines, "kd").tables[0].rows] == ["kd", "rkl", "sft"]


@pytest.mark.parametrize(("metric", "verdict"), [("kl", "better"), ("acc", "worse"), ("entropy", "lower")])
def test_the_verdict_knows_which_way_is_better(metric, verdict):
    comparison = compare([*cell("sft", 0, metric=metric), *cell("kd", -0.2, metric=metric)], "sft")
    assert row_of(comparison, "kd").difference.verdict == verdict


def test_a_difference_within_the_seeds_is_not_shown_however_sure_the_items():
    comparison = compare([*cell("sft", 0, noise=0.2), *cell("kd", -0.1, noise=0.2)], "sft")
    difference = row_of(comparison, "kd").difference
    assert difference.items.p < 1e-6 and difference.resampled[1] < 0 < difference.seeds.high
    assert difference.verdict == "not shown"


def test_a_difference_within_the_items_is_not_shown_however_equal_the_seeds():
    lines = [*cell("sft", 0, noise=0.0), *cell("kd", 0, noise=0.0)]
    uneven = np.random.default_rng(9).normal(-0.05, 1.5, N)
    lines = [
        replace(line, items=list(np.add(line.items, uneven)), value=float(np.mean(np.add(line.items, uneven))))
        if line.name == "kd"
        else line
        for line in lines
    ]
    difference = row_of(compare(lines, "sft"), "kd").difference
    assert difference.items.low < 0 < difference.items.high
    assert difference.verdict == "not shown"


def test_holm_takes_back_what_one_comparison_alone_would_show():
    """The same cell, once alone and once among twenty that are as the baseline."""
    one = cell("kd", -0.007, noise=0.0)
    sft = cell("sft", 0.0, noise=0.0)
    alone = row_of(compare([*sft, *one], "sft"), "kd").difference
    among = row_of(
        compare([*sft, *one, *(line for i in range(20) for line in cell(f"x{i}", 0.0, noise=0.0))], "sft"), "kd"
    )
    assert alone.verdict == "better" and alone.p > 0.05 / 21
    assert among.difference.verdict == "not shown" and among.difference.resampled[1] < 0


def test_a_difference_that_few_items_carry_is_not_shown():
    """The p-value of Student's t is below 0.05, and the bootstrap, which sees how skewed the items are, has 0 in it."""
    skewed = 0.35 - np.random.default_rng(172).gamma(0.3, 0.6, 30)
    lines = [result("sft", "cities", "acc", np.zeros(30)), result("kd", "cities", "acc", skewed)]
    difference = row_of(compare(lines, "sft"), "kd").difference
    assert difference.p < 0.05 and difference.items.low > 0 > difference.resampled[0]
    assert difference.verdict == "not shown"


def test_one_seed_is_judged_over_items_alone_and_that_is_said():
    comparison = compare([*cell("sft", 0, seeds=(0,)), *cell("kd", -0.1, seeds=(0,))], "sft")
    difference = row_of(comparison, "kd").difference
    assert difference.seeds is None and difference.p == difference.items.p and difference.verdict == "better"
    assert any("one seed (0)" in note and "items alone" in note for note in comparison.notes)


def test_without_items_seeds_alone_judge_and_that_is_said():
    comparison = compare([*cell("sft", 0, items=False), *cell("kd", -0.1, items=False)], "sft")
    difference = row_of(comparison, "kd").difference
    assert difference.items is None and difference.resampled is None and difference.p == difference.seeds.p
    assert difference.verdict == "better"
    assert "Without items, so that seeds alone can judge: heldout kl." in comparison.notes
    mixed = compare([*cell("sft", 0), *cell("rkl", 0), *cell("kd", -0.1, items=False)], "sft")
    assert "Without items, so that seeds alone can judge: heldout kl (`kd`)." in mixed.notes
    assert row_of(mixed, "rkl").difference.items is not None and row_of(mixed, "kd").difference.items is None


def test_neither_items_nor_seeds_test_nothing():
    comparison = compare([*cell("sft", 0, seeds=(0,), items=False), *cell("kd", -0.1, seeds=(0,), items=False)], "sft")
    assert row_of(comparison, "kd").difference.verdict == "not tested"


def test_equal_models_do_not_differ_by_rounding():
    """The mean of three equal values and one of them differ in the last bit."""
    lines = [result("sft", "cities", "acc", 0.1, n=5, seed=seed) for seed in range(3)]
    lines += [result("kd", "cities", "acc", 0.1, n=5, seed=0)]
    difference = row_of(compare(lines, "sft"), "kd").difference
    assert difference.value == 0 and difference.verdict == "not shown"
    items = [0.1, 0.7, 0.3, 0.9]
    lines = [result("sft", "cities", "bits_per_byte", items, seed=seed) for seed in range(3)]
    lines += [result("kd", "cities", "bits_per_byte", items, seed=0)]
    difference = row_of(compare(lines, "sft"), "kd").difference
    assert difference.items.p == 1 and difference.verdict == "not shown"


def test_a_seed_that_is_not_finite_takes_the_mean_with_it_and_is_named():
    lines = [*cell("sft", 0), *cell("kd", -0.1), *cell("rkl", -0.1)]
    lines[4] = replace(lines[4], value=math.nan, items=[None, *lines[4].items[1:]])
    comparison = compare(lines, "sft")
    assert math.isnan(row_of(comparison, "kd").mean) and row_of(comparison, "kd").difference is None
    assert row_of(comparison, "rkl").difference.verdict == "better"
    assert any("No finite number" in note and "`kd` seed 1 (heldout kl)" in note for note in comparison.notes)


def test_what_is_missing_is_named():
    lines = [*cell("sft", 0), *cell("kd", -0.1, seeds=(0, 2)), *cell("sft", 0, metric="loss")]
    lines += cell("teacher", -0.5, seeds=(None,))
    (note,) = (note for note in compare(lines, "sft").notes if note.startswith("Missing"))
    assert note.partition(": ")[2] == (
        "`kd` seeds 0, 2 (heldout loss not measured); `kd` seed 1 (nothing was measured); "
        "`teacher` (heldout loss not measured)."
    )


def test_other_amounts_of_training_are_named():
    lines = [*cell("sft", 0), *cell("kd", -0.1), *cell("long", -0.1)]
    lines += [
        result(name, "training", "training_tokens", n, seed=0)
        for name, n in (("sft", 1000), ("kd", 1005), ("long", 2000))
    ]
    (note,) = (note for note in compare(lines, "sft").notes if "tokens" in note)
    assert "`long` (2,000)" in note and "`sft` (1,000)" in note and "kd" not in note


def test_the_last_of_two_measurements_counts_and_that_is_said():
    lines = [*cell("sft", 0), *cell("kd", -0.1), *cell("kd", -0.3)]
    comparison = compare(lines, "sft")
    assert row_of(comparison, "kd").difference.value == pytest.approx(-0.3, abs=0.02)
    assert "3 results were measured again: the last one counts." in comparison.notes


def test_validations_are_shown_and_not_tested():
    """A sweep chooses learning rates by them."""
    lines = [*cell("sft", 0), *cell("kd", -0.1)]
    lines += [result(name, "validation", "kl", value, seed=0) for name, value in (("sft", 0.5), ("kd", 0.1))]
    comparison = compare(lines, "sft")
    assert [table.task for table in comparison.tables] == ["heldout"]
    assert [(facts.task, facts.rows["kd"]["kl"].mean) for facts in comparison.facts] == [("validation", 0.1)]


def test_failed_runs_are_named(tmp_path):
    file = tmp_path / "failed.jsonl"
    file.write_text('{"run": "1", "name": "kd, lr=3, seed 2", "exit_code": 3, "message": "The loss\\n is nan."}\n')
    failures = read_failures([file])
    assert failures == ["Failed with exit code 3: `kd, lr=3, seed 2` (The loss is nan)."]
    assert compare([*cell("sft", 0), *cell("kd", 0)], "sft", failures=failures).notes[0] == failures[0]
    file.write_text("[]\n")
    with pytest.raises(UserError, match=r"Line 1 of .*failed\.jsonl is no failed run"):
        read_failures([file])


def two(**other):
    """Two models, the second of which was measured otherwise."""
    sft, kd = cell("sft", 0), cell("kd", -0.1)
    return [*sft, *(replace(line, **other) for line in kd)]


def timed(task, machine, metric="decode_seconds_p50"):
    kinds = (("sft", "Xeon, 2 threads"), ("kd", machine))
    return [*two(), *(result(name, task, metric, 0.1, machine=on, seed=0) for name, on in kinds)]


@pytest.mark.parametrize(
    ("lines", "baseline", "message"),
    [
        (two(), "stf", r"There is no baseline `stf`: did you mean `sft`\?"),
        (two(), "teacher", r"There is no baseline `teacher`: choose one of sft, kd\."),
        ([], "sft", r"no results"),
        (cell("sft", 0), "sft", r"Nothing can be compared with `sft`.*heldout"),
        ([*cell("sft", 0), *cell("kd", 0, metric="loss")], "sft", r"Nothing can be compared with `sft`"),
        (
            two(data="heldout-v2"),
            "sft",
            r"`sft` and `kd` were evaluated on different items in heldout \(kl, seed 0\): .*v1.*v2",
        ),
        (two(n=39), "sft", r"different items"),
        (
            [*cell("sft", 0, weights=[1.0] * N), *cell("kd", 0, weights=[2.0] * N)],
            "sft",
            r"different tokenizers.*bits per byte",
        ),
        (
            [*cell("sft", 0, reference="a"), *cell("kd", 0, reference="b")],
            "sft",
            r"different references.*one `reference`",
        ),
        (
            [
                *timed("latency 8", "Xeon, 2 threads")[:-1],
                replace(timed("latency 8", "Xeon, 2 threads")[-1], data="fp32"),
            ],
            "sft",
            r"timed on different work in latency 8 .*`latency`",
        ),
        (timed("latency 8", "H100"), "sft", r"timed on different machines in latency 8 .*Xeon, 2 threads, and H100"),
        ([*two(), replace(cell("kd", 0)[1], run="another")], "sft", r"called `kd` and are of another training run"),
        (
            [*two(), replace(cell("kd", 0)[1], model="teacher", cell="kd")],
            "sft",
            r"called `kd` and are of another model",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(lines, baseline, message):
    with pytest.raises(UserError, match=message) as caught:
        compare(lines, baseline)
    assert "\n" not in str(caught.value)


def test_seconds_of_training_on_other_machines_are_left_out_and_that_is_said():
    lines = timed("training", "H100", "training_seconds")
    lines += [result(name, "training", "peak_bytes", 5e9, seed=0) for name in ("sft", "kd")]
    comparison = compare(lines, "sft")
    (facts,) = comparison.facts
    assert facts.metrics == ["peak_bytes"]
    assert any("seconds of training are left out" in note and "H100" in note for note in comparison.notes)
    same = compare(timed("training", "Xeon, 2 threads", "training_seconds"), "sft")
    assert same.facts[0].rows["kd"]["training_seconds"].mean == 0.1


def test_quality_is_compared_across_machines():
    assert compare(two(machine="H100"), "sft").provenance["machines"][1] == "H100"


def test_chosen_metrics():
    comparison = compare(grid(seeds=(0, 1)), "sft", metrics=["kl", "decode_seconds_p50"])
    assert [(table.task, table.metric) for table in comparison.tables] == [("heldout", "kl")]
    assert [(facts.task, len(facts.metrics)) for facts in comparison.facts] == [
        ("latency 1", 1),
        ("latency 8", 1),
        ("size", 3),
        ("training", 5),
    ]
    with pytest.raises(UserError, match=r"There is no metric `lk`: did you mean `kl`\?"):
        compare(grid(seeds=(0,)), "sft", metrics=["lk"])


def test_json_holds_it_all_without_nan(tmp_path):
    lines = [*cell("sft", 0), *cell("kd", -0.1), *cell("bad", 0)]
    lines[-1] = replace(lines[-1], value=math.nan)
    comparison = compare(lines, "sft", title="A title")
    write_comparison(comparison, tmp_path / "comparison.json")
    read = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (read["schema"], read["title"], read["baseline"]) == (1, "A title", "sft")
    sft, kd, bad = read["tables"][0]["rows"]
    assert kd["difference"]["seeds"]["se"] == row_of(comparison, "kd").difference.seeds.se
    assert sft["difference"] is None and bad["mean"] is None and bad["values"][-1] is None
