"""One side of ``benchmarks.recipe`` in a process of its own: set a recipe up, train, write what it took."""

import ctypes
import gc
import importlib.util
import json
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf


def main(recipe_file: str, config_file: str, output_file: str) -> None:
    spec = importlib.util.spec_from_file_location("recipe_under_test", recipe_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe_class = next(
        value for name, value in vars(module).items() if name.startswith("KDRecipe") and isinstance(value, type)
    )
    cfg = OmegaConf.load(config_file)
    recipe = recipe_class(cfg)
    recipe.setup(cfg)
    recipe.save_checkpoint = lambda *args, **kwargs: None  # the same work on both sides, and not what is measured
    _give_back_free_memory()
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    start = time.perf_counter()
    recipe.train()
    seconds = time.perf_counter() - start
    recipe.cleanup()
    Path(output_file).write_text(json.dumps({"loaded": loaded, "peak": _status("VmHWM"), "seconds": seconds}))


def _give_back_free_memory() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")


if __name__ == "__main__":
    main(*sys.argv[1:])
