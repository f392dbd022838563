"""Modules of ``examples/hinton``, which is not installed."""

import importlib
import importlib.util
import sys
from types import ModuleType

from helpers.checkout import CHECKOUT


def load(name: str) -> ModuleType:
    """Return a module of the example, under a name that no folder of tests has."""
    package = "checkout_hinton"
    if package not in sys.modules:
        folder = CHECKOUT / "examples" / "hinton"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")
