"""A recipe of ours or torchtune's on random weights, in a process of its own, and the plan of the same run."""

import json
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

from ._job import CHECKOUT, Skip

STEPS_TIMED, STEPS_COUNTED = 4, 2
OURS = {"lora": "8B_to_1B_KD_lora_single_device.yaml", "full": "8B_to_1B_KD_full_single_device.yaml"}


class Shape(NamedTuple):
    """Describe what a step works on."""

    batch: int  # sequences of a microbatch
    sequence: int  # S
    microbatches: int  # of a step
    vocab: int  # V

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.batch * self.sequence * self.microbatches


LLAMA = Shape(4, 512, 8, 128256)  # the shipped configs, and what `plan` takes where no length is given
TINY = Shape(2, 24, 2, 384)
_TINY_MODEL = {
    "vocab_size": TINY.vocab,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 128,
    "max_seq_len": 64,
}


def check_torchtune() -> None:
    """Raise Skip where torchtune, or what it imports, is not there."""
    try:
        import torchtune_kd.training  # noqa: F401
    except ImportError as error:
        raise Skip(
            f"torchtune cannot be imported ({' '.join(str(error).split())[:200].rstrip('.')}); benchmarks/README.md "
            "names what it needs"
        ) from error


def our_config(kind: str, folder: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Return the shipped config of a ``lora`` or ``full`` student with random weights, as plain values."""
    cfg = _load(CHECKOUT / "configs" / "llama3_2" / OURS[kind])
    cfg |= {"checkpointer": None, "teacher_checkpointer": None, "random_weights": True, "overwrite_output_dir": True}
    return _common(cfg, folder, device, tiny) | {"metric_logger": _logger(folder, device)}


def stock_config(folder: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Return torchtune's own config of a LoRA student with random weights, as plain values."""
    path = distribution("torchtune").locate_file("recipes/configs/llama3_2/8B_to_1B_KD_lora_single_device.yaml")
    cfg = _common(_load(Path(str(path))), folder, device, tiny)
    for name, model in (("checkpointer", "model"), ("teacher_checkpointer", "teacher_model")):
        weights = {"section": cfg[model], "device": device, "dtype": cfg["dtype"]}
        cfg[name] = {"_component_": "benchmarks.gpu._standins.RandomCheckpointer", **weights}
    return cfg | {"metric_logger": _logger(folder, device) | {"ends_run": True}}


def _load(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


def _common(cfg: dict[str, Any], folder: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Replace what needs files, and in a tiny run the models."""
    shape, steps = TINY if tiny else LLAMA, 1 + STEPS_TIMED + STEPS_COUNTED
    cfg |= {
        "output_dir": str(folder / "out"),
        "tokenizer": {"_component_": "benchmarks.gpu._standins.IdTokenizer", "max_seq_len": shape.sequence},
        "dataset": {
            "_component_": "benchmarks.gpu._standins.RandomRows",
            "rows": shape.batch * shape.microbatches * steps,
            "vocab": shape.vocab,
        },
        "seed": 0,
        "shuffle": False,
        "batch_size": shape.batch,
        "gradient_accumulation_steps": shape.microbatches,
        "max_steps_per_epoch": steps,
        "log_every_n_steps": 1,
        "log_peak_memory_stats": True,
        "device": device,
    }
    if tiny:
        lora = cfg["model"]["_component_"].rpartition(".")[2].startswith("lora")
        adapters = {name: value for name, value in cfg["model"].items() if "lora" in name} if lora else {}
        student = f"torchtune.models.llama3_2.{'lora_' if lora else ''}llama3_2"
        cfg["model"] = {"_component_": student, **_TINY_MODEL, **adapters}
        cfg["teacher_model"] = {"_component_": "torchtune.models.llama3_1.llama3_1", **_TINY_MODEL}
    return cfg


def _logger(folder: Path, device: str) -> dict[str, Any]:
    return {
        "_component_": "benchmarks.gpu._standins.StepClock",
        "output": str(folder / "steps.json"),
        "device": device,
        "timed": STEPS_TIMED,
        "counted": STEPS_COUNTED,
    }


class Failed(Exception):
    """A run that ended with an error; its text is the last line that it printed."""


def tune_run(recipe: str, cfg: dict[str, Any], folder: Path, *arguments: str, timeout: float) -> str:
    """Run ``tune run <recipe>`` on ``cfg`` and return what it prints.

    Raises:
        Failed: if it ends with an error, or not within ``timeout`` seconds.
    """
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    OmegaConf.save(OmegaConf.create(cfg), path)
    command = [sys.executable, "-m", "benchmarks.gpu._tune", "run", recipe, "--config", str(path), *arguments]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=max(timeout, 1.0))
    except subprocess.TimeoutExpired:
        raise Failed(f"not finished within {timeout:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        memory = next((line for line in lines if "out of memory" in line.lower()), None)
        raise Failed("out of memory" if memory else (lines or ["no message"])[-1][:300])
    return done.stdout


def measured_steps(recipe: str, cfg: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Run a recipe whose logger is a ``StepClock``; return what that found, and the seconds until its first step."""
    started = time.time()
    tune_run(recipe, cfg, folder, timeout=timeout)
    found = json.loads((folder / "steps.json").read_text())
    return found | {"start": found.pop("first_step_ended") - started}
