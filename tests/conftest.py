"""What every test relies on: the package under test is known, no hub is asked, random numbers repeat."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # also for the processes that tests start
# Threads that spin while they wait make a busy machine ten times slower. PyTorch reads it when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks at it once, when it is imported

CHECKOUT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Stop where Python finds a part of the package only: a wheel hidden by the checkout it was built from."""
    package, kernels = (find_spec(name) for name in ("torchtune_kd", "torchtune_kd.kernels"))
    if kernels is None:
        raise pytest.UsageError(
            f"{Path(package.origin).parent} has no kernels, recipes and configs, and hides the installed ones: "
            "run `pytest` rather than `python -m pytest`, or install this checkout with `make install`."
        )


def pytest_report_header() -> str:
    """Say whether the tests run against this checkout or against an installed wheel."""
    kernels = Path(find_spec("torchtune_kd.kernels").origin).resolve().parent
    if kernels == CHECKOUT / "kernels":
        return f"torchtune_kd: this checkout ({CHECKOUT})"
    return f"torchtune_kd: a wheel in {kernels.parents[1]}, not this checkout"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a model that is downloaded: `make check` does not wait for a network."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.heavy)


def pytest_collection_finish() -> None:
    """Keep the thousands of collected tests out of every later garbage collection, which they make seconds long."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let what the interpreter frees at its end be freed: some libraries report the rest as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct."""
    from helpers.assets import smollm2_folder

    return smollm2_folder()
