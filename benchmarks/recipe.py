"""torchtune's stock single-device KD recipe and ours, in turn: tokens per second and peak memory.

    python -m benchmarks.recipe

Same models (SmolLM2-135M-Instruct, 30 layers -> 15 of them), data (rows of exactly 256 tokens), batch (4),
LoRA settings (rank 64 on q, v, output and the MLP), forward KL at T = 1 beside the cross-entropy with kd_ratio
0.5, AdamW, seed, bf16 on the CPU. Each run is a process of its own; the sides alternate. A step's time comes from
the recipe's own log, tokens per second count all 1024 tokens of a step on both sides, and the first step of a run
is left out. Memory is the high-water mark of the resident set during training, less what was resident before it,
when both models were loaded. Both recipes log every step; ours computes its distances to the teacher in each.
"""

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from statistics import median

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.errors import exit_with_message
from torchtune_kd.tools import fetch_smollm2, prune_checkpoint, select_layers

from ._measure import describe_machine
from ._recipe_parts import print_parts

BATCH, LENGTH = 4, 256
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 64,
    "lora_alpha": 128,
}


def stock_recipe() -> Path:
    """The file of torchtune's recipe; its `recipes` package cannot be imported."""
    return Path(str(distribution("torchtune").locate_file("recipes/knowledge_distillation_single_device.py")))


def our_recipe() -> Path:
    import torchtune_kd.recipes

    return Path(torchtune_kd.recipes.__path__[0]) / "kd.py"


def write_rows(path: Path, rows: int) -> None:
    """Reference prose that ships with Python, cut so that each row has more than 256 tokens."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    size = len(text) // rows
    if size < 2000:
        raise SystemExit(f"{rows} rows leave {size} characters each, fewer than 256 tokens need: lower --steps.")
    pieces = (text[i * size : (i + 1) * size] for i in range(rows))
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))


def make_config(side: str, folder: Path, teacher: Path, student: Path, steps: int) -> DictConfig:
    def checkpointer(path: Path) -> dict:
        return {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(path),
            "checkpoint_files": sorted(file.name for file in path.glob("*.safetensors")),
            "recipe_checkpoint": None,
            "output_dir": "${output_dir}",
            "model_type": "LLAMA3_2",
        }

    cfg = {
        "output_dir": str(folder / f"out-{side}"),
        "model": {"_component_": "torchtune_kd.models.smollm2.lora_smollm2_135m", "num_layers": 15, **LORA},
        "teacher_model": {"_component_": "torchtune_kd.models.smollm2.smollm2_135m"},
        "tokenizer": {
            "_component_": "torchtune_kd.models.smollm2.smollm2_tokenizer",
            "path": str(teacher / "tokenizer.json"),
            "max_seq_len": LENGTH,
        },
        "checkpointer": checkpointer(student),
        "teacher_checkpointer": checkpointer(teacher),
        "resume_from_checkpoint": False,
        "dataset": {
            "_component_": "torchtune.datasets.text_completion_dataset",
            "source": "json",
            "data_files": str(folder / "rows.jsonl"),
            "column": "text",
            "split": "train",
        },
        "seed": 0,
        "shuffle": False,
        "batch_size": BATCH,
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": 3e-4},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "kd_ratio": 0.5,
        "epochs": 1,
        "max_steps_per_epoch": steps,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "enable_activation_checkpointing": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}",
            "filename": "log.txt",
        },
        "log_every_n_steps": 1,
        "device": "cpu",
        "dtype": "bf16",
    }
    if side == "stock":
        cfg["loss"] = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
        cfg["kd_loss"] = {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}
    else:
        cfg["kd_loss"] = {"_component_": "torchtune_kd.losses.ForwardKLLoss"}
        cfg["overwrite_output_dir"] = True
    return OmegaConf.create(cfg)


def run(side: str, folder: Path, cfg: DictConfig) -> dict:
    """One run in its own process: seconds per step without the first, and bytes."""
    config_file, output_file = folder / f"{side}.yaml", folder / f"{side}.json"
    OmegaConf.save(cfg, config_file)
    log = Path(cfg.output_dir) / "log.txt"
    log.unlink(missing_ok=True)
    recipe = stock_recipe() if side == "stock" else our_recipe()
    command = [sys.executable, "-m", "benchmarks._recipe_worker", recipe, config_file, output_file]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"The {side} recipe ended with {result.returncode}:\n{result.stderr[-3000:]}")
    steps = [
        dict(pair.rsplit(":", 1) for pair in line.partition(" | ")[2].split()) for line in log.read_text().splitlines()
    ]
    # the stock recipe counts all tokens of the rows, ours those that have a next token
    counted = BATCH * (LENGTH if side == "stock" else LENGTH - 1)
    seconds = [counted / float(step["tokens_per_second_per_gpu"]) for step in steps[1:]]
    memory = json.loads(output_file.read_text())
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": BATCH * LENGTH / median(seconds),
        "loaded_bytes": memory["loaded"],
        "added_bytes": memory["peak"] - memory["loaded"],
    }


@exit_with_message()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument(
        "--steps", type=int, default=5, help="optimizer steps per run, the first not counted (default 5)"
    )
    parser.add_argument(
        "--parts", action="store_true", help="also time the parts of one of our steps, and the least it can take"
    )
    parser.add_argument("--output", type=Path, help="write all numbers as JSON")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.steps < 2:
        parser.error("expected --pairs of at least 1 and --steps of at least 2")

    machine = describe_machine()
    print(machine)
    teacher = fetch_smollm2()
    pairs, parts = [], None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prune_checkpoint(teacher, folder / "student", select_layers(30, 15, "even"))
        write_rows(folder / "rows.jsonl", BATCH * args.steps)
        print(f"\n{'':6}{'stock':>24}{'torchtune-kd':>26}{'ratio':>20}")
        print(
            f"{'pair':6}{'tokens/s':>12}{'added MiB':>12}{'tokens/s':>14}{'added MiB':>12}{'speed':>10}{'memory':>10}"
        )
        for index in range(args.pairs):
            order = ("stock", "ours") if index % 2 == 0 else ("ours", "stock")
            pair = {
                side: run(side, folder, make_config(side, folder, teacher, folder / "student", args.steps))
                for side in order
            }
            pairs.append(pair)
            _print_row(str(index + 1), pair)
        if args.parts:
            parts = print_parts(make_config("ours", folder, teacher, folder / "student", args.steps))
    summary = {
        side: {
            key: median(pair[side][key] for pair in pairs)
            for key in ("tokens_per_second", "added_bytes", "loaded_bytes")
        }
        for side in ("stock", "ours")
    }
    _print_row("median", summary)
    for side, name in (("stock", "stock"), ("ours", "torchtune-kd")):
        print(f"{name}: {summary[side]['loaded_bytes'] / 2**20:.0f} MiB resident before training")
    if args.output:
        args.output.write_text(
            json.dumps({"machine": machine, "pairs": pairs, "median": summary, "parts": parts}, indent=2)
        )


def _print_row(name: str, pair: dict) -> None:
    stock, ours = pair["stock"], pair["ours"]
    print(
        f"{name:6}{stock['tokens_per_second']:12.1f}{stock['added_bytes'] / 2**20:12.0f}"
        f"{ours['tokens_per_second']:14.1f}{ours['added_bytes'] / 2**20:12.0f}"
        f"{ours['tokens_per_second'] / stock['tokens_per_second']:9.2f}x"
        f"{ours['added_bytes'] / stock['added_bytes']:9.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
