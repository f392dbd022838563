"""The report as text: a golden one, nothing bold that is not shown, and numbers that can be read."""

import re
from pathlib import Path

import pytest

from helpers.synthetic_results import grid, result
from torchtune_kd.reports.comparison import compare
from torchtune_kd.reports.comparison_report import as_markdown
from torchtune_kd.reports.pictures import Pictures
from torchtune_kd.reports.tables import as_markdown as table_as_markdown
from torchtune_kd.reports.tables import as_text, overview, quality_grid, si

GOLDEN = Path(__file__).with_name("golden_report.md")
NO_PICTURES = Pictures({}, [], ["No plots: this test draws none."])


def small():
    """Two seeds, four texts: `kd` is 0.1 nats below `sft` in every text, `a|b` has one seed and no items."""
    texts = [0.2, 0.4, 0.6, 0.8]
    lines = []
    for seed, shift in ((0, -0.01), (1, 0.01)):
        for name, less in (("sft", 0.0), ("kd", 0.1)):
            where = {"seed": seed, "run": f"{name}-{seed}", "reference": "teacher"}
            lines.append(result(name, "heldout", "kl", [text + shift - less for text in texts], **where))
            lines.append(result(name, "training", "training_seconds", 100 + 10 * seed - 100 * less, **where))
            lines.append(result(name, "training", "training_tokens", 25_500, **where))
    lines.append(result("a|b", "heldout", "kl", 0.503, n=4, data="heldout-v1", seed=0, run="a|b-0"))
    lines += [result(name, "latency 1", "decode_seconds_p50", 0.029, seed=0) for name in ("sft", "kd")]
    return compare(lines, "sft", title="Two cells")


def test_golden_report():
    """Computed by hand: pooled SD 0.0141 with 2 degrees of freedom, so that ± 4.303 * 0.0141 are the seeds' interval.

    To write it anew: ``python tests/reports/test_tables.py``, and read what changed.
    """
    assert as_markdown(small(), NO_PICTURES) == GOLDEN.read_text(encoding="utf-8")


def test_nothing_is_bold_that_is_not_shown():
    comparison = compare(grid(), "sft")
    seen = set()
    for table in comparison.tables:
        text = table_as_markdown(quality_grid(table, "sft"))
        for row, line in zip(table.rows, text.splitlines()[2:], strict=True):
            is_shown = row.difference is not None and row.difference.is_shown
            assert ("**" in line) == is_shown, line
            seen.add(is_shown)
    assert seen == {True, False}


def test_overview_marks_what_is_shown():
    comparison = compare(grid(), "sft")
    text = as_text(overview(comparison, comparison.tables[:2]))
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert len({len(line) for line in text.splitlines()}) == 1
    assert lines["untrained"].count("−") == 2 and lines["teacher"].count("+") == 2
    assert not re.search("[+−]", lines["sft"])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (162_847_400, "bytes", "163 MB"),
        (1.24e13, "FLOP", "12.4 TFLOP"),
        (81_413_568, "", "81.4 M"),
        (999_999, "", "1.00 M"),
        (50, "", "50"),
        (0.0291, "s", "29.1 ms"),
        (102.4, "s", "102 s"),
        (4211.0, "s", "4,211 s"),
        (34.56, "tokens/s", "34.6 /s"),
        (0.0, "FLOP", "0 FLOP"),
        (float("nan"), "s", "–"),
    ],
)
def test_figures_have_three_digits_and_a_prefix(value, unit, text):
    assert si(value, unit) == text


if __name__ == "__main__":
    GOLDEN.write_text(as_markdown(small(), NO_PICTURES), encoding="utf-8")
