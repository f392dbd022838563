"""Run code in a process that compiles Triton's kernels, where the tests' own interpret them."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

from helpers.checkout import CHECKOUT

NO_TRITON = importlib.util.find_spec("triton") is None
OLD_TRITON = NO_TRITON or Version(version("triton")) < Version("3.9")
needs_triton = pytest.mark.skipif(NO_TRITON, reason="Triton is not installed")
gated = pytest.mark.skipif(OLD_TRITON, reason="the limits are those of the Triton that constraints.txt pins")

# Prints the names of all kernels.
KERNELS = """
import triton, torchtune_kd.kernels
modules = [module for name, module in sys.modules.items() if name.startswith("torchtune_kd.kernels.")]
values = [value for module in modules for value in vars(module).values()]
print(json.dumps([v.fn.__name__ for v in values if isinstance(v, triton.JITFunction) and "_kernel" in v.fn.__name__]))
"""


def compiling(code: str, *args: str) -> object:
    """Return what `code` prints as JSON, in a process that compiles; it may use the benchmark's modules."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = f"import json, sys; sys.path.append({str(CHECKOUT)!r})\n"
    start += "from benchmarks import _launches as launches, binaries\n"
    command = [sys.executable, "-W", "ignore", "-c", start + code, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
