"""What ``torchtune_kd/plan`` predicts of the steps that another section measures."""

import json
from pathlib import Path
from typing import Any

from ._job import Emit, Job, Row
from ._recipe import Failed, check_torchtune, our_config, tune_run

TITLE = "What the plan predicts"
PARTS = ("lora", "full")
GIB = 2**30


def run(job: Job, emit: Emit) -> None:
    """Plan one of the runs, as ``tune run torchtune_kd/plan`` does; on the CPU, nothing is loaded."""
    check_torchtune()
    folder = Path(job.folder)
    cfg = our_config(job.part, folder, job.device, job.rehearse)
    try:
        printed = tune_run("benchmarks/plan.py", cfg, folder, "json=True", timeout=job.seconds)
        planned = json.loads(printed[printed.index("{") :])
    except (Failed, ValueError) as error:
        emit({"kind": job.part, "error": str(error)})
        return
    for side, name in (("ours", "torchtune_kd"), ("stock", "stock")):
        recipe = planned.get(name)
        if recipe is not None:
            seconds = {gpu: times["total"] for gpu, times in (recipe["seconds_per_step"] or {}).items()}
            emit({"kind": job.part, "side": side, "bytes": recipe["memory"]["total"], "seconds": seconds})


def prediction(rows: list[Row], kind: str, side: str) -> Row | None:
    return next((row for row in rows if row["kind"] == kind and row.get("side") == side), None)


def problems(rows: list[Row]) -> list[str]:
    return [f"plan of {row['kind']}: {row['error']}" for row in rows if "error" in row]


def render(rows: list[Row], facts: dict[str, Any]) -> str:
    """A line a run."""
    lines = []
    for row in rows:
        if "error" in row:
            lines.append(f"- {row['kind']}: {row['error']}")
            continue
        times = ", ".join(f"{gpu} {seconds:.2f} s" for gpu, seconds in row["seconds"].items())
        memory = "unknown memory" if row["bytes"] is None else f"{row['bytes'] / GIB:.3g} GiB"
        lines.append(f"- {row['kind']}, {row['side']}: {memory}" + (f"; a step: {times}" if times else ""))
    return "\n".join(lines) or "Nothing was planned."
