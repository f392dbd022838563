"""Which divergences and backends the tests run for."""

import pytest
import torch
from interpreter import patch_language_once_a_launch

from torchtune_kd.kernels import DIVERGENCES, Objective, _api, _checks

patch_language_once_a_launch()

# Every divergence at its default, at a lopsided beta, at the ends where formulas change, and near them.
VARIANTS = [
    ("forward_kl", None),
    ("reverse_kl", None),
    *(("symmetric_kl", beta) for beta in (0.0, 0.3, 1.0)),
    *(("jsd", beta) for beta in (0.0, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0)),
    *(("skew_forward_kl", beta) for beta in (0.0, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0)),
    *(("skew_reverse_kl", beta) for beta in (0.0, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0)),
    ("tvd", None),
]


def pytest_generate_tests(metafunc):
    """Tests that take `divergence` and `beta` run for every variant; `divergence` alone for every default; `backend`
    for both."""
    names = metafunc.fixturenames
    marks = pytest.mark.slow if metafunc.definition.get_closest_marker("slow_interpreted") else ()
    if {"divergence", "beta", "backend"} <= set(names):
        # interpreted kernels take milliseconds a row: the defaults, and betas at both ends by test_every_beta_is_right
        cases = [(*variant, "torch") for variant in VARIANTS]
        cases += [pytest.param(name, Objective(name).beta, "triton", marks=marks) for name in DIVERGENCES]
        metafunc.parametrize(("divergence", "beta", "backend"), cases, indirect=["backend"])
        return
    if "backend" in names:
        metafunc.parametrize("backend", ["torch", pytest.param("triton", marks=marks)], indirect=True)
    if "divergence" in names and "beta" in names:
        metafunc.parametrize(("divergence", "beta"), VARIANTS)
    elif "divergence" in names:
        metafunc.parametrize("divergence", DIVERGENCES)


@pytest.fixture
def backend(request, monkeypatch):
    """What ``backend="auto"`` stands for in a test on a CPU; Triton is interpreted and leaves fp64 to torch."""

    def resolve(backend, *tensors):
        if backend == "auto" and not any(t is not None and t.dtype == torch.float64 for t in tensors):
            backend = "triton"
        return _checks.resolve_backend(backend, *tensors)

    if request.param == "triton":
        monkeypatch.setattr(_api, "resolve_backend", resolve)
    return request.param
