"""Modules of this checkout that are not installed."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).resolve().parents[2]


def benchmarks(name: str) -> ModuleType:
    """A module of the folder ``benchmarks``, under a name that no folder of tests has."""
    package = "checkout_benchmarks"
    if package not in sys.modules:
        folder = CHECKOUT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")
