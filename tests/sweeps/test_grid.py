"""The cells of a sweep."""

import pytest

from torchtune_kd.errors import UserError
from torchtune_kd.sweeps.grid import Cell, cells_of, tuning_points

GRID = {"kd_loss._component_": {"FKL": "a.F", "RKL": "a.R"}, "kd_loss.temperature": [1, 2]}


def test_a_grid_is_the_product_then_come_single_cells():
    cells = cells_of(GRID, {"sft": {"kd_ratio": 0.0}}, [])
    assert [cell.name for cell in cells] == ["FKL, T=1", "FKL, T=2", "RKL, T=1", "RKL, T=2", "sft"]
    assert cells[1] == Cell(
        "FKL, T=2",
        {"kd_loss._component_": "FKL", "kd_loss.temperature": 2},
        {"kd_loss._component_": "a.F", "kd_loss.temperature": 2},
    )
    assert cells[-1] == Cell("sft", {}, {"kd_ratio": 0.0})


def test_exclusions_leave_cells_out():
    cells = cells_of(GRID, {}, [{"kd_loss._component_": "RKL", "kd_loss.temperature": 2}, {"kd_loss.temperature": 1}])
    assert [cell.name for cell in cells] == ["FKL, T=2"]


@pytest.mark.parametrize(
    "grid, single, exclude, said",
    [
        (GRID, {}, [{"kd_loss.temperature": 3}], r"`exclude\[0\]` is .* no cell of the grid"),
        (GRID, {"FKL, T=1": {}}, [], "stands twice"),
        ({}, {}, [], "at least one cell"),
        ({"a": []}, {}, [], "under `grid` for `a`"),
        ({"a": 3}, {}, [], "under `grid` for `a`"),
    ],
)
def test_what_is_no_grid_is_one_sentence(grid, single, exclude, said):
    with pytest.raises(UserError, match=said):
        cells_of(grid, single, exclude)


def test_every_cell_is_tuned_over_the_same_points():
    assert list(tuning_points({"optimizer.lr": [1, 2], "batch_size": [4]})) == [
        {"optimizer.lr": 1, "batch_size": 4},
        {"optimizer.lr": 2, "batch_size": 4},
    ]
    assert list(tuning_points({})) == [{}]
