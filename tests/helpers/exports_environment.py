"""Find the environment that holds transformers and peft, which cannot live beside torchtune's torchao."""

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def exports_python() -> str:
    """Return the path of its Python, ``EXPORTS_PYTHON`` or the one of ``make exports``, or skip the test."""
    python = Path(os.environ.get("EXPORTS_PYTHON", CHECKOUT / ".venv-exports" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"{python} with transformers and peft is not there: run `make exports`, or set EXPORTS_PYTHON.")
    return str(python)
