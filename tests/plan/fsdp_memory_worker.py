"""Started by test_memory.py under torchrun: a line of JSON from each process and config, planned and measured bytes."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.measured import measured_step, sized_config, weight_bytes
from torchtune_kd.plan import Layout, build_models, plan_memory
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.training import leave_process_group, read_config


class Recipe(KDRecipe):
    def cleanup(self) -> None:
        """Keep the process group for the next config."""


for kind, overrides in (
    ("full", {}),
    ("full", {"gradient_accumulation_steps": 1, "fsdp_reshard_after_forward": False}),
    ("qlora", {"enable_activation_checkpointing": True}),
):
    folder = Path(sys.argv[1]) / f"{os.environ['RANK']}_{kind}_{len(overrides)}"
    folder.mkdir()
    cfg = sized_config(folder, 12, kind, batch_size=2, **overrides)
    measured, run = measured_step(cfg, Recipe)
    config = read_config(cfg, distributed=True)
    planned = plan_memory(config, build_models(config, 2), Layout(2, 1, True), 128)[0]
    figures = {
        "kind": kind,
        "planned": planned.total,
        "measured": measured,
        "planned weights": planned.teacher + planned.student,
        "measured weights": weight_bytes(run),
    }
    print(json.dumps(figures) + "\n", end="", flush=True)
    del run
leave_process_group()
