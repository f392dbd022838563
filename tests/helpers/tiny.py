"""A teacher and a student that train in a second: real files, real components, random weights.

Width 256 so that NF4 can hold every matrix; the teacher's head is its own, the student's is tied.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from torchtune import config
from torchtune.data import Message
from torchtune.datasets import text_completion_dataset
from torchtune.models.convert_weights import tune_to_hf

from helpers.forked import needs_fsdp2_on_a_cpu

TEACHER = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 512}
STUDENT = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 256}
VOCAB = 384
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}


def model_section(kind: str, sizes: dict[str, int], vocab: int = VOCAB, tied: bool = True, **more: Any) -> dict:
    """YAML of a Llama-architecture model; ``kind`` is full, lora, dora, qlora or qdora."""
    section = {
        "_component_": f"torchtune.models.llama3_2.{'' if kind == 'full' else 'lora_'}llama3_2",
        "vocab_size": vocab,
        "max_seq_len": 64,
        "scale_factor": 1,
        "tie_word_embeddings": tied,
        **sizes,
    }
    if kind != "full":
        section |= LORA | {"use_dora": kind.endswith("dora"), "quantize_base": kind.startswith("q")}
    return section | more


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges, with the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(path))


def write_checkpoint(folder: Path, section: dict, seed: int) -> Path:
    """A Hugging Face folder with random weights for a full-weight ``model_section``."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = config.instantiate(OmegaConf.create(section))
    hf = tune_to_hf(model.state_dict(), section["num_heads"], section["num_kv_heads"], section["embed_dim"])
    save_file({name: weight.contiguous() for name, weight in hf.items()}, folder / "model.safetensors")
    architecture = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": section["embed_dim"],
        "intermediate_size": section["intermediate_dim"],
        "num_attention_heads": section["num_heads"],
        "num_hidden_layers": section["num_layers"],
        "num_key_value_heads": section["num_kv_heads"],
        "tie_word_embeddings": section["tie_word_embeddings"],
        "vocab_size": section["vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(architecture))
    write_tokenizer(folder / "tokenizer.json")
    return folder


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


# 24 rows of very different length; a row of one character has no next token, hence no valid label
ROWS = [("the quick brown fox jumps over the lazy dog " * 2)[: 1 + (7 * i) % 40] for i in range(24)]


def dataset_section(path: Path, **more: Any) -> dict:
    return {
        "_component_": "torchtune.datasets.text_completion_dataset",
        "source": "json",
        "data_files": str(path),
        "column": "text",
        "split": "train",
        "add_eos": False,
    } | more


def empty_dataset(tokenizer: Any) -> list:
    """A dataset whose filters left nothing."""
    return []


def image_dataset(tokenizer: Any) -> list[dict]:
    """A row of text, and one with an image, for which Llama 3's tokenizer has an id that no text model has."""
    question, image = {"type": "text", "content": "What?"}, {"type": "image", "content": None}
    rows = []
    for content in ([question], [image, question]):
        turns = [Message(role="user", content=content), Message(role="assistant", content="A cat.")]
        tokens, _ = tokenizer.tokenize_messages(turns)
        rows.append({"tokens": tokens, "labels": tokens})
    return rows


def masked_dataset(tokenizer: Any, first: int, last: int) -> list[dict]:
    """A row of which the tokens from ``first`` to before ``last`` have a label, and a row without tokens."""
    tokens = tokenizer.encode("the quick brown fox jumps over", add_eos=False)
    labels = [token if first <= index < last else -100 for index, token in enumerate(tokens)]
    return [{"tokens": tokens, "labels": labels}, {"tokens": [], "labels": []}]


class NoisyRows(Dataset):
    """Rows with one random token in each, another one every time."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        tokens = list(row["tokens"])
        tokens[torch.randint(len(tokens), ()).item()] = torch.randint(3, VOCAB // 2, ()).item()
        return {"tokens": tokens, "labels": tokens}


def noisy_dataset(tokenizer: Any, **more: Any) -> NoisyRows:
    """:func:`dataset_section`'s, as data augmentation changes it."""
    return NoisyRows(text_completion_dataset(tokenizer, **more))


def checkpointer_section(folder: Path) -> dict:
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": ["model.safetensors"],
        "recipe_checkpoint": None,
        "output_dir": "${output_dir}",
        "model_type": "LLAMA3_2",
    }


def make_config(folder: Path, kind: str = "full", rows: list[str] = ROWS, **overrides: Any) -> DictConfig:
    """A whole config over files written into ``folder`` (once); ``overrides`` are dotted keys with ``__`` for dots."""
    teacher = model_section("full", TEACHER, tied=False)
    student = model_section("full", STUDENT)
    if not (folder / "teacher").exists():
        write_checkpoint(folder / "teacher", teacher, seed=1)
        write_checkpoint(folder / "student", student, seed=2)
    write_rows(folder / "rows.jsonl", rows)
    cfg = OmegaConf.create(
        {
            "output_dir": str(folder / "out"),
            "model": model_section(kind, STUDENT),
            "teacher_model": teacher,
            "tokenizer": {
                "_component_": "torchtune_kd.models.smollm2.smollm2_tokenizer",
                "path": str(folder / "student" / "tokenizer.json"),
                "max_seq_len": 64,
            },
            "checkpointer": checkpointer_section(folder / "student"),
            "teacher_checkpointer": checkpointer_section(folder / "teacher"),
            "dataset": dataset_section(folder / "rows.jsonl"),
            "seed": 7,
            "shuffle": False,
            "batch_size": 4,
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
            "kd_loss": {"_component_": "torchtune_kd.losses.ForwardKLLoss", "temperature": 2.0},
            "kd_ratio": 0.5,
            "epochs": 1,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": "${output_dir}/logs",
                "filename": "log.txt",
            },
            "device": "cpu",
            "dtype": "fp32",
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def run_in_process(cfg: DictConfig, on: Mapping[str, Callable[[Any], None]] | None = None) -> Any:
    """Run the recipe from set-up to clean-up in this process; returns the run.

    ``on`` maps events to functions of the run, see :mod:`torchtune_kd.training.events`.
    """
    from torchtune_kd.recipes.kd import KDRecipe

    recipe = KDRecipe(cfg)
    recipe.setup()
    for event, listener in (on or {}).items():
        recipe._run.on(event, functools.partial(listener, recipe._run))
    recipe.train()
    run = recipe._run
    recipe.cleanup()
    return run


def run_tune(cfg: DictConfig, recipe: str, nproc: int | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """Run a recipe by the real ``tune run``, with torchrun's ``--nproc_per_node`` where ``nproc`` is given."""
    if nproc is not None and cfg.device == "cpu":
        needs_fsdp2_on_a_cpu()
    path = Path(cfg.output_dir).parent / f"{Path(cfg.output_dir).name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, path)
    command = [str(Path(sys.executable).parent / "tune"), "run"]
    if nproc is not None:
        command += [
            "--nproc_per_node",
            str(nproc),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "127.0.0.1:0",
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, recipe, "--config", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr[-4000:]}")
    return result


def read_log(output_dir: str | Path) -> list[dict[str, float]]:
    """The steps that torchtune's DiskLogger wrote, each with its ``step``; validation lines are steps too."""
    steps = []
    for line in (Path(output_dir) / "logs" / "log.txt").read_text().splitlines():
        head, _, values = line.partition(" | ")
        pairs = (pair.rsplit(":", 1) for pair in values.split())
        steps.append({"step": int(head.removeprefix("Step "))} | {name: float(value) for name, value in pairs})
    return steps
