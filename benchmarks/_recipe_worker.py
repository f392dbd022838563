"""One side of ``benchmarks.recipe`` in a process of its own: set a recipe up, train, write what it took."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks._measure import peak_bytes, release_free_memory, reset_peak, resident_bytes


def main(recipe_file: str, config_file: str, output_file: str) -> None:
    spec = importlib.util.spec_from_file_location("recipe_under_test", recipe_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe_class = next(
        value for name, value in vars(module).items() if name.startswith("KDRecipe") and isinstance(value, type)
    )
    cfg = OmegaConf.load(config_file)
    recipe = recipe_class(cfg)
    if hasattr(recipe, "train_step"):  # ours
        recipe.setup()
    else:
        recipe.setup(cfg)
    saving = _timed_checkpoints(module)
    # an export is the same work on both sides, and not what is measured
    recipe.save_checkpoint = lambda *args, **kwargs: None
    if hasattr(module, "kd"):
        module.kd.export_epoch = lambda *args, **kwargs: None
    release_free_memory()
    loaded = resident_bytes()
    reset_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    recipe.train()
    recipe.cleanup()
    measured = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    measured["saving_seconds"] = sum(saving)
    Path(output_file).write_text(json.dumps({"loaded": loaded, "peak": peak_bytes()} | measured))


def _timed_checkpoints(module: Any) -> list[float]:
    """The seconds of each of our recipe's checkpoints, from the next one on; it grows."""
    seconds: list[float] = []
    shared = getattr(module, "kd", None)  # torchtune's recipe has none
    if shared is not None:
        original = shared.checkpoint_if_due

        def timed(run: Any) -> None:
            start = time.perf_counter()
            original(run)
            seconds.append(time.perf_counter() - start)

        shared.checkpoint_if_due = timed
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
