"""Started under torchrun: a line of JSON from each process and config, planned and measured bytes.

Arguments: a folder, and "one" or "several", the teachers of the runs.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.measured import measured_step, sized_config, weight_bytes
from helpers.several import members, with_teachers
from torchtune_kd.plan import Layout, build_models, plan_memory
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.training import leave_process_group, read_config


class Recipe(KDRecipe):
    def cleanup(self) -> None:
        """Keep the process group for the next config."""


CASES = {
    "one": (
        ("full", {}, []),
        ("full", {"gradient_accumulation_steps": 1, "fsdp_reshard_after_forward": False}, []),
        ("qlora", {"enable_activation_checkpointing": True}, []),
    ),
    "several": (
        ("lora", {}, ["wide", "narrow"]),
        ("lora", {"fsdp_reshard_after_forward": False}, ["wide", "narrow", "base"]),
        ("full", {}, ["ema"]),
        ("lora", {}, ["base"]),
    ),
}
for number, (kind, overrides, names) in enumerate(CASES[sys.argv[2]]):
    folder = Path(sys.argv[1]) / f"{os.environ['RANK']}_{number}"
    folder.mkdir()
    cfg = sized_config(folder, 12, kind, batch_size=2, **overrides)
    if names:
        cfg = with_teachers(cfg, *(members(cfg)[name] for name in names))
    measured, run = measured_step(cfg, Recipe)
    config = read_config(cfg, distributed=True)
    planned = plan_memory(config, build_models(config, 2), Layout(2, 1, True), 128)[0]
    figures = {
        "kind": " ".join([kind, *names]),
        "planned": planned.total,
        "measured": measured,
        "planned weights": planned.teacher + planned.student,
        "measured weights": weight_bytes(run),
    }
    print(json.dumps(figures) + "\n", end="", flush=True)
    del run
leave_process_group()
