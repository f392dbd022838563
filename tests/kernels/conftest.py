"""Which divergences, backends and devices the tests run for.

``pytest tests/kernels --device cuda`` runs the tests that take `device` on a GPU, where nothing is interpreted: those
that compare with the formula in fp64, in value and gradient. Without the option all tests run, on the CPU.
"""

import os
from pathlib import Path

import pytest
import torch

from helpers.interpreter import patch_language_once_a_launch
from torchtune_kd.kernels import DIVERGENCES, Objective, _call, _checks

HERE = Path(__file__).parent

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


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests that take `device` compute")


def device_of(config):
    return config.getoption("--device", "cpu")  # unknown where pytest was started above this folder


def pytest_configure(config):
    if device_of(config) == "cpu":
        patch_language_once_a_launch()
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA GPU, and PyTorch finds none; leave it out to use the CPU")
    os.environ["TRITON_INTERPRET"] = "0"  # looked at when Triton is imported, which was not yet


def pytest_collection_modifyitems(config, items):
    """Leave out tests that are about a CPU, where another device was asked for."""
    here = [item for item in items if item.path.parent == HERE]
    if device_of(config) == "cpu":
        return
    left_out = [item for item in here if "device" not in item.fixturenames]
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def device(request):
    """Type of the device that a test's tensors are made on; here functions of torch make them there by themselves."""
    name = device_of(request.config)
    if name == "cpu":
        yield name
        return
    torch.set_default_device(name)
    yield name
    torch.set_default_device(None)


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
    """Return what ``backend="auto"`` stands for in a test; Triton is interpreted on a CPU, and leaves fp64 to torch."""

    def resolve(backend, *tensors):
        if backend == "auto" and not any(t is not None and t.dtype == torch.float64 for t in tensors):
            backend = request.param
        return _checks.resolve_backend(backend, *tensors)

    monkeypatch.setattr(_call, "resolve_backend", resolve)
    return request.param
