"""Compute what other projects would have stored of the tiny teacher, from its logits."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import config

from helpers.tiny import ROWS, dataset_section, make_config, write_rows
from torchtune_kd.tools.import_cache import main


class Said(NamedTuple):
    """A document, and the teacher's log-probabilities at T = 1 of what follows each token."""

    tokens: list[int]
    log_probs: Tensor  # [L, V]


def run_config(folder: Path, out: str | Path = "", **more) -> DictConfig:
    """Two steps at T = 1, with validation."""
    cfg = make_config(folder, output_dir=str(out), max_steps_per_epoch=2, **more)
    cfg.dataset_val = dataset_section(write_rows(folder / "val.jsonl", ROWS[5:12]))
    cfg.kd_loss.temperature = 1.0
    return cfg


@torch.no_grad()
def said_by_the_teacher(cfg: DictConfig) -> list[Said]:
    """Every row of the training data that has a token to predict."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    teacher = config.instantiate(cfg.teacher_model)
    teacher.load_state_dict(config.instantiate(cfg.teacher_checkpointer).load_checkpoint()["model"])
    rows = config.instantiate(cfg.dataset, config.instantiate(cfg.tokenizer))
    tokens = [row["tokens"] for row in rows if len(row["tokens"]) > 1]
    return [Said(ids, torch.log_softmax(teacher(torch.tensor([ids]))[0].float(), -1)) for ids in tokens]


def listed(said: Said, at: int, k: int) -> dict[int, float]:
    """The k likeliest ids after a token, and the one that follows, as vLLM lists them."""
    row = said.log_probs[at]
    ids = [*row.topk(k).indices.tolist(), *said.tokens[at + 1 : at + 2]]
    return {index: row[index].item() for index in ids}


def vllm_rows(said: list[Said], k: int = 8) -> list[dict]:
    rows = []
    for each in said:
        entries: list[dict | None] = [None]
        for at in range(len(each.tokens) - 1):
            top = listed(each, at, k)
            entries.append({str(i): {"logprob": v, "rank": 1, "decoded_token": "?"} for i, v in top.items()})
        rows.append({"prompt_token_ids": each.tokens, "prompt_logprobs": entries})
    return rows


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def imported(cfg: DictConfig, format: str, source: Path, output: Path, *options: str) -> Path:
    """``output``, written by the command line."""
    file = output.with_suffix(".yaml")
    OmegaConf.save(cfg, file)
    main([format, str(source), str(output), "--config", str(file), *options])
    return output


def answers(tokenizer, source: str, answer_field: str = "answer") -> list[dict]:
    """A dataset of which the answers' tokens alone have a label: those of the last so many tokens of each row."""
    rows = []
    for line in Path(source).read_text().splitlines():
        row = json.loads(line)
        tokens = row["tokens"]
        begin, end = row[answer_field]
        labels = [token if begin <= at < end else -100 for at, token in enumerate(tokens)]
        rows.append({"tokens": tokens, "labels": labels})
    return rows


def answers_section(path: Path) -> dict:
    return {"_component_": "helpers.foreign.answers", "source": str(path)}
