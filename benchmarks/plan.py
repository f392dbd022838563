"""torchtune's stock recipe beside ours, computed: ``tune run benchmarks/plan.py --config ... devices=8``.

Nothing is loaded, trained or measured: both columns are what ``tune run torchtune_kd/plan`` computes, by a step of ours
and by one of torchtune's. The keys are the same too, ``json=True`` among them: it prints the plan's JSON and "stock",
which holds the other column.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig

from torchtune_kd.plan import as_dict, build_models, plan_run, read_request
from torchtune_kd.plan.memory import GIB

from ._stock_step import STOCK_LOSSES, dry_stock_step, stock_communication, why_stock_cannot


def both(cfg: DictConfig) -> dict[str, Any]:
    """Return the plan of ``cfg`` as plain values, with that of the stock recipe as "stock", None if it cannot run.

    Raises:
        UserError: as :func:`torchtune_kd.plan.plan_run` does.
    """
    request, config, layout = read_request(cfg)
    found = as_dict(plan_run(request, config, layout))
    why = why_stock_cannot(build_models(config, layout.shards))
    found |= {"stock": None, "why_no_stock": why}
    if why is None:
        plain = config.with_keys({"teacher_head": None})  # torchtune's has none in 8-bit floats
        stock = plan_run(request, plain, layout, step=dry_stock_step, travels=stock_communication)
        found["stock"] = as_dict(stock)["torchtune_kd"]
        if not found["parameters"]["adapters"]:
            said = "the stock recipe trains adapters alone: its column is what it would take to train this student"
            found["assumptions"].append(said)
        if (divergence := config.kd_loss.build().divergence) not in STOCK_LOSSES:
            found["assumptions"].append(f"the stock recipe has no {divergence}: its forward KL is taken")
    return found


def as_text(found: dict[str, Any]) -> str:
    """Write both columns as a table, per device and optimizer step."""
    ours, stock = dict(_rows(found["torchtune_kd"])), dict(_rows(found["stock"] or found["torchtune_kd"]))
    width = max(map(len, ours)) + 2
    lines = [f"{'per device and step':{width}}{'torchtune-kd':>14}{'stock recipe':>14}", "-" * (width + 28)]
    for label, cell in ours.items():
        lines.append(f"{label:{width}}{cell:>14}{stock[label] if found['stock'] else '':>14}")
    if found["why_no_stock"]:
        lines += ["", f"torchtune's stock recipe is left out: {found['why_no_stock']}."]
    return "\n".join([*lines, "", "Assumed:", *(f"- {said}" for said in found["assumptions"])])


def _rows(recipe: dict[str, Any]) -> Iterator[tuple[str, str]]:
    memory = recipe["memory"]
    for part, size in memory["most"].items():
        yield f"{part}, GiB", "unknown" if size is None else f"{size / GIB:,.2f}"
    for phase, size in memory["phases"].items():
        yield f"highest in {phase}, GiB", f"{size / GIB:,.2f}"
    if recipe["largest_batch_size"] is not None:
        yield "largest batch_size", str(recipe["largest_batch_size"])
    for phase, count in recipe["flops_per_step"].items():
        yield f"{phase}, TFLOP", f"{count / 1e12:,.3g}"
    for what, size in recipe["communication_per_step"].items():
        if size:
            yield f"{what.replace('_', ' ')} received, GiB", f"{size / GIB:,.2f}"
    for device, seconds in (recipe["seconds_per_step"] or {}).items():
        yield f"on {device}, seconds", f"{seconds['total']:.2f}"


@kd.command
def recipe_main(cfg: DictConfig) -> None:
    """Print the plan of our recipe and of torchtune's stock one for the same config; keys as in torchtune_kd/plan."""
    found = both(cfg)
    print(json.dumps(found, indent=2) if cfg.get("json") else as_text(found))


if __name__ == "__main__":
    sys.exit(recipe_main())
