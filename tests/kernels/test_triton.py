"""The Triton kernels, interpreted, against the formula in fp64 over the grid."""

import pytest
import torch
from grid import GRID, VALUES
from grid_checks import check_hidden, check_logits

from torchtune_kd.kernels import Objective

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of lanes that are masked out

F64 = torch.float64

# A program is a row, so that more rows are more of the same and a program takes milliseconds here: 129 become 5.
ROWS = {0: 0, 1: 1, 3: 3, 129: 5}
CASES = [(v, ROWS[n], *rest) for v, n, *rest in GRID if F64 not in rest[3]]


@pytest.mark.parametrize(VALUES.keys(), CASES)
def test_value_and_gradient_from_logits(divergence, v, n, t, kd_ratio, labels, dtypes, kind):
    check_logits(divergence, Objective(divergence).beta, v, n, t, kd_ratio, labels, dtypes, kind, "triton")


@pytest.mark.parametrize((*VALUES, "chunk_tokens"), [(*case, (None, 2, 1)[i % 3]) for i, case in enumerate(CASES)])
def test_value_and_gradient_from_hidden_states(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens):
    check_hidden(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens, "triton")
