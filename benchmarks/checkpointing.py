"""What checkpoints cost: the same training with ``save_every_n_steps`` and without, in turns.

    python -m benchmarks.checkpointing

SmolLM2-135M-Instruct (30 layers) distilled into 15 of its layers, all weights trained with AdamW, bf16 on the CPU, by
default two rows of 256 tokens a step, which takes more than a second; data, models and optimizer are those of
``benchmarks.recipe``. Each run is a process of its own, the sides alternate, and who begins changes with every round.
Time is that of the whole training loop, saves included; loading models before and writing the final weights after it
are left out. A machine whose speed drifts by more than a checkpoint costs hides that between two runs; the last
column is what the run with checkpoints waited for them, of its own time. A checkpoint is trained weights and two
moments in bf16, 6 bytes a weight; it is flushed to the disk, and every file read again for its checksum.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.errors import exit_with_message
from torchtune_kd.tools import fetch_smollm2, prune_checkpoint, select_layers

from ._measure import describe_machine
from .recipe import LENGTH, make_config, our_recipe, write_rows

SIDES = ("without", "with", "background")


def side_config(side: str, folder: Path, teacher: Path, steps: int, every: int, rows: int) -> DictConfig:
    cfg = make_config("ours", folder, teacher, folder / "student", steps)
    cfg.model = {"_component_": "torchtune_kd.models.smollm2.smollm2_135m", "num_layers": 15}
    cfg.batch_size = rows
    cfg.output_dir = str(folder / f"out-{side}")
    cfg.save_every_n_steps = None if side == "without" else every
    cfg.enable_async_checkpointing = side == "background"
    return cfg


def run(side: str, folder: Path, cfg: DictConfig) -> dict[str, float]:
    """Seconds of the training loop, of all threads' work in it, and of what a checkpoint keeps it waiting."""
    config_file, output_file = folder / f"{side}.yaml", folder / f"{side}.json"
    OmegaConf.save(cfg, config_file)
    command = [sys.executable, "-m", "benchmarks._recipe_worker", our_recipe(), config_file, output_file]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"The run {side} checkpoints ended with {result.returncode}:\n{result.stderr[-3000:]}")
    measured = json.loads(output_file.read_text())
    return {name: measured[name] for name in ("seconds", "cpu_seconds", "saving_seconds")}


def checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of the newest checkpoint that a run has left."""
    newest = max((folder / "out-with").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    return sum(path.stat().st_size for path in newest.iterdir())


@exit_with_message()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpointing", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="rounds, in each every side runs once (default 3)")
    parser.add_argument("--every", type=int, default=50, help="save_every_n_steps (default 50)")
    parser.add_argument("--saves", type=int, default=1, help="checkpoints per run (default 1)")
    parser.add_argument("--rows", type=int, default=2, help=f"rows of {LENGTH} tokens per step (default 2)")
    parser.add_argument("--background", action="store_true", help="also enable_async_checkpointing: True")
    parser.add_argument("--output", type=Path, help="write all numbers as JSON")
    args = parser.parse_args(argv)
    if min(args.pairs, args.every, args.saves, args.rows) < 1:
        parser.error("expected --pairs, --every, --saves and --rows of at least 1")

    machine, steps = describe_machine(), args.every * args.saves
    sides = SIDES if args.background else SIDES[:2]
    print(machine)
    teacher = fetch_smollm2()
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prune_checkpoint(teacher, folder / "student", select_layers(30, 15, "even"))
        write_rows(folder / "rows.jsonl", args.rows * steps)
        print(
            f"\n{'':8}"
            + "".join(f"{side:>24}" for side in sides)
            + f"{'throughput, with/without':>28}{'lost to saving':>16}"
        )
        print(f"{'round':8}" + f"{'s/step':>12}{'CPU s/step':>12}" * len(sides) + f"{'time':>18}{'CPU time':>10}")
        for index in range(args.pairs):
            order = sides if index % 2 == 0 else sides[::-1]
            results = {s: run(s, folder, side_config(s, folder, teacher, steps, args.every, args.rows)) for s in order}
            rounds.append({side: results[side] for side in sides})
            _print_row(str(index + 1), rounds[-1], steps)
        size = checkpoint_bytes(folder)
    summary = {s: {name: median(r[s][name] for r in rounds) for name in rounds[0][s]} for s in sides}
    _print_row("median", summary, steps)
    print(f"a checkpoint has {size / 2**20:.0f} MiB; a step {args.rows} x {LENGTH} tokens; {steps} steps a run")
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "steps": steps, "rounds": rounds, "median": summary}))


def _print_row(name: str, results: dict[str, dict[str, float]], steps: int) -> None:
    columns = "".join(f"{r['seconds'] / steps:12.3f}{r['cpu_seconds'] / steps:12.3f}" for r in results.values())
    ratios = [results["without"][key] / results["with"][key] for key in ("seconds", "cpu_seconds")]
    lost = results["with"]["saving_seconds"] / results["with"]["seconds"]
    print(f"{name:8}{columns}{ratios[0]:17.3f}x{ratios[1]:9.3f}x{lost:16.1%}", flush=True)


if __name__ == "__main__":
    main()
