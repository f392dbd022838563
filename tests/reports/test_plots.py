"""Figures are drawn where their data are there, show what they say, and fit into a page."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib.image
import pytest
from matplotlib.collections import PathCollection

from helpers.synthetic_results import curves, grid, result
from torchtune_kd.errors import UserError
from torchtune_kd.reports import plots
from torchtune_kd.reports.comparison import compare
from torchtune_kd.reports.pictures import INK, draw_pictures, read_curves


@pytest.fixture(scope="module")
def comparison():
    return compare(grid(), "sft")


@pytest.fixture(scope="module")
def curves_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("curves") / "curves.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in curves()))
    return file


@pytest.mark.slow
def test_every_kind_is_drawn_and_none_is_blank(tmp_path, comparison, curves_file):
    pictures = draw_pictures(comparison, read_curves([curves_file], {None}), tmp_path / "plots")
    assert pictures.missing == []
    drawn = [picture for group in (*pictures.of_tables.values(), pictures.others) for picture in group]
    kinds = [picture.file.name.partition("-")[0] for picture in drawn]
    assert {kind: kinds.count(kind) for kind in kinds} == {"forest": 5, "heat": 5, "pareto": 2, "curves": 1}
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == sorted(each.file.name for each in drawn)
    ids = []
    for picture in drawn:
        pixels = matplotlib.image.imread(picture.file)
        assert pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels[..., :3].std() > 0.05, picture.file
        assert "http" not in picture.svg and INK not in picture.svg and "currentColor" in picture.svg
        root = ElementTree.fromstring(picture.svg.replace("xlink:href", "href"))
        ids += [element.get("id") for element in root.iter() if element.get("id")]
        assert root.get("aria-label") == picture.caption
    assert ids and len(ids) == len(set(ids))


def test_what_is_not_there_is_not_drawn_and_that_is_said(tmp_path):
    lines = [result(name, "cities", "acc", value, n=9, data="d") for name, value in (("sft", 0.4), ("kd", 0.5))]
    pictures = draw_pictures(compare(lines, "sft"), {}, tmp_path / "plots")
    assert [said.split(":")[0] for said in pictures.missing] == [
        "No forest plot",
        "No heat map",
        "No plot of quality over latency",
        "No learning curves",
    ]
    assert pictures.others == [] and list((tmp_path / "plots").iterdir()) == []


def test_forest_shows_both_intervals_of_each_row(comparison):
    (table,) = (table for table in comparison.tables if table.metric == "acc")
    (axes,) = plots.forest(table, "sft").axes
    rows = [row for row in table.rows if row.name != "sft"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in reversed(rows)]
    drawn = {tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2}
    cells = [row for row in rows if row.seeds != [None]]
    for row in cells:
        seeds = row.difference.seeds
        assert row.difference.resampled in drawn and (seeds.low, seeds.high) in drawn
    markers = [line for line in axes.lines if len(line.get_xdata()) == 1]
    hollow = [line for line in markers if line.get_markerfacecolor() == plots.PAPER]
    assert len(markers) == 2 * len(cells)
    assert len(hollow) == 2 * sum(not row.difference.is_shown for row in cells) > 0


def test_forest_names_what_is_out_of_sight(comparison):
    """Untrained student and teacher are far from all cells, which they would squeeze."""
    table = comparison.tables[0]
    (axes,) = plots.forest(table, "sft").axes
    untrained, teacher = table.rows[-2:]
    assert (untrained.name, teacher.name) == ("untrained", "teacher")
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"◀ −{-teacher.difference.value:.3f}", f"+{untrained.difference.value:.3f} ▶"]
    low, high = axes.get_xlim()
    assert low > teacher.difference.value and high < untrained.difference.value


def test_heat_map_has_value_and_error_in_each_cell(comparison):
    table = comparison.tables[0]
    axes = plots.heat_map(table, comparison.coordinates).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("kd_loss.temperature", "kd_loss")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    texts = {text.get_text() for text in axes.texts}
    (row,) = (row for row in table.rows if row.name == "jsd-T2")
    assert len(axes.texts) == 12 and f"{row.mean:.3f}\n±{row.se_seeds:.3f}" in texts


def test_heat_map_of_three_keys_holds_the_third_and_says_so(comparison):
    """Nine of the cells at one learning rate, three at another: the nine are shown."""
    places = {name: {**place, "lr": 3e-4 if "T4" in name else 6e-4} for name, place in comparison.coordinates.items()}
    (x_key, xs), (y_key, ys), cells, fixed = plots.plane(comparison.tables[0].rows, places)
    assert (x_key, xs, y_key, len(ys)) == ("kd_loss.temperature", [1, 2], "kd_loss", 4)
    assert len(cells) == 8 and fixed == {"lr": 6e-4}
    one = {name: {"kd_loss": place["kd_loss"]} for name, place in places.items()}
    assert plots.plane(comparison.tables[0].rows, one) is None


def test_pareto_has_a_point_for_each_timed_model(comparison):
    latency, size = comparison.facts_of("latency"), comparison.facts_of("size")
    (axes,) = plots.pareto(comparison.tables[0], latency, size).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [row.name for row in sorted(comparison.tables[0].rows, key=lambda row: -row.mean)]
    areas = sorted(float(dots.get_sizes()[0]) for dots in axes.collections if isinstance(dots, PathCollection))
    assert areas[-1] / areas[0] == pytest.approx(134_515_008 / 81_413_568)
    few = replace(latency, rows={"sft": latency.rows["sft"]})
    assert plots.pareto(comparison.tables[0], few, size) is None


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.5), (4.0, 1.0)]
    assert plots._front(points, better=-1) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert plots._front(points, better=1) == [(1.0, 5.0)]


def test_learning_curves_are_means_at_the_steps_that_all_seeds_have():
    seeds = [[(0, 4.0), (10, 2.0), (20, 1.0)], [(0, 2.0), (10, 1.0)]]
    (axes,) = plots.learning_curves("val_kl", {"kd": seeds}).axes
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 10], [3.0, 1.5])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 4.0)
    assert axes.get_ylabel() == "KL to the reference, nats/token"
    assert plots.learning_curves("val_kl", {"kd": [[]]}) is None


def test_curves_are_read_by_metric_and_cell(tmp_path, curves_file):
    read = read_curves([curves_file], {None})
    assert list(read) == ["val_kl"] and len(read["val_kl"]) == 13
    assert [len(points) for points in read["val_kl"]["jsd-T2"]] == [11, 11, 11]
    cut = tmp_path / "curves.jsonl"
    cut.write_text(curves_file.read_text()[:-5])
    assert len(read_curves([cut], {None})["val_kl"]["skew-T4"]) == 2
    tuning = {"run": "only tuned", "cell": "sft", "seed": 0, "metric": "val_kl", "points": [[0, 9.0]]}
    cut.write_text(curves_file.read_text() + json.dumps(tuning) + "\n")
    assert read_curves([cut], {"chosen", None}) == read
    assert read_curves([cut], {"only tuned"})["val_kl"]["sft"][0] == [(0.0, 9.0)]
    cut.write_text('{"cell": "a", "points": []}\n')
    with pytest.raises(UserError, match=r"Line 1 of .*curves\.jsonl is no learning curve"):
        read_curves([cut], {None})
