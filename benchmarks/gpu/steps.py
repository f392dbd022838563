"""Steps of the true Llama 3.1 8B -> 3.2 1B shapes with random weights, ours and torchtune's."""

from pathlib import Path
from statistics import median
from typing import Any

from ..losses._report import markdown_table
from ._job import Clock, Emit, Job, Row
from ._recipe import LLAMA, STEPS_TIMED, TINY, Failed, check_torchtune, measured_steps, our_config, stock_config
from .plan import prediction

TITLE = "Whole steps"
PARTS = ("",)
RUNS = (("lora", "ours"), ("lora", "stock"), ("full", "ours"))
GIB = 2**30


def run(job: Job, emit: Emit) -> None:
    """Run one recipe after the other, each in a process of its own."""
    check_torchtune()
    clock, longest = Clock(job.seconds), 0.0
    for kind, side in RUNS:
        row: Row = {"kind": kind, "side": side, "tokens": (TINY if job.rehearse else LLAMA).tokens}
        folder = Path(job.folder) / f"{kind}-{side}"
        left = clock.left()
        if left <= 0.8 * longest:  # a run that is cut tells nothing
            emit(row | {"left_out": f"{max(left, 0):.0f} s were left, and the one before took {longest:.0f} s"})
            continue
        try:
            if side == "ours":
                cfg, recipe = our_config(kind, folder, job.device, job.rehearse), "torchtune_kd/kd_single_device"
            else:
                cfg, recipe = stock_config(folder, job.device, job.rehearse), "knowledge_distillation_single_device"
            emit(row | measured_steps(recipe, cfg, folder, left))
        except Failed as error:
            emit(row | {"error": str(error)})
        longest = max(longest, left - clock.left())


def problems(rows: list[Row]) -> list[str]:
    """Return a line for each of our own runs that failed; that torchtune's does not fit is a result."""
    return [f"{row['kind']}, {row['side']}: {row['error']}" for row in rows if "error" in row and row["side"] == "ours"]


def render(rows: list[Row], facts: dict[str, Any]) -> str:
    """Speed and memory of each run, and what was predicted of them."""
    planned = facts.get("plan", [])
    gpu = known_gpu(facts.get("name", ""), planned)
    table, notes = [], []
    for row in rows:
        name = f"{row['kind']}, {'torchtune-kd' if row['side'] == 'ours' else 'stock recipe'}"
        if "seconds" not in row:
            notes.append(f"- {name}: {row.get('error') or 'left out: ' + row['left_out']}")
            continue
        foreseen = prediction(planned, row["kind"], row["side"]) or {"bytes": None, "seconds": {}}
        seconds, peaks = median(row["seconds"]), [peak for peak in row["peaks"] if peak is not None]
        waits = [sum(places.values()) for places in row["waits"]]
        table.append(
            (
                name,
                f"{seconds:.3f} s",
                _seconds(foreseen["seconds"].get(gpu)),
                f"{row['tokens'] / seconds:,.0f}",
                _gib(max(peaks, default=None)),
                _gib(foreseen["bytes"]),
                "-" if not waits else str(max(waits)),
                f"{row['start']:.0f} s" if "start" in row else "-",
            )
        )
    plan = f"plan, {gpu}" if gpu else "plan"
    heads = ("run", "step", plan, "tokens/s", "peak GiB", "plan GiB", "host waits", "start")
    tokens = rows[0]["tokens"] if rows else 0
    parts = [
        f"The shipped configs with random weights and rows of random ids, {tokens:,} tokens a step; the median of "
        f"{STEPS_TIMED} steps after the first. `host waits` is how often the host waited for the device in a step "
        "after those; `start` the time from the command to the end of the first step. The stock recipe trains adapters "
        "alone and has no temperature."
    ]
    if table:
        parts.append(markdown_table(heads, table))
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def known_gpu(name: str, planned: list[Row]) -> str:
    """Return which of the plan's GPUs the device is, by its name; "" if it is none of them."""
    known = {gpu for row in planned for gpu in row.get("seconds", {})}
    return next((gpu for gpu in sorted(known) if gpu in name.replace(" ", "")), "")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.3g}"
