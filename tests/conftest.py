"""What every test relies on: the package under test is known, no hub is asked, random numbers repeat."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # also for the processes that tests start

CHECKOUT = Path(__file__).resolve().parents[1]


def pytest_report_header() -> str:
    """Which torchtune_kd the tests run against; an error where Python finds only a part of it."""
    package, kernels = (find_spec(name) for name in ("torchtune_kd", "torchtune_kd.kernels"))
    if kernels is None:
        raise pytest.UsageError(
            f"{Path(package.origin).parent} has no kernels, recipes and configs, and hides the installed: "
            "run `pytest` rather than `python -m pytest`, or install this checkout with `make install`."
        )
    if CHECKOUT not in Path(kernels.origin).resolve().parents:
        return f"torchtune_kd: the one installed at {Path(package.origin).parent}, not this checkout"
    return f"torchtune_kd: this checkout ({CHECKOUT})"


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
