"""A run for each kind of teacher: the tiniest that accumulates, validates, saves and exports."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from helpers.cached import write
from helpers.resumable import resumable_config
from helpers.tiny import (
    ROWS,
    STUDENT,
    TEACHER,
    checkpointer_section,
    dataset_section,
    model_section,
    write_checkpoint,
    write_rows,
)

NO_LIVE = {"teacher_model": None, "teacher_checkpointer": None}
CACHES = {
    "states in bf16": {"dtype": "bf16"},
    "states in int8": {"dtype": "int8"},
    "likeliest ids": {"kind": "top_k", "dtype": None, "k": 8},
    "drawn ids": {"kind": "sampled", "dtype": None},
}
OTHERS = (
    "mean of probabilities",
    "mean of logits",
    "specialists",
    "base",
    "ema",
    "layers in int8",
    "layers in nf4",
)
KINDS = (*CACHES, *OTHERS)

# how often each begins in a run of 2 epochs of 4 steps with 2 microbatches, checkpoints every 3, validation every 2
TIMES = {"microbatch": 16, "gradients": 8, "update": 8, "validation": 5, "manifest": 2, "rename": 4, "export": 2}


def run_of(kind: str, folder: Path, name: str, size: int = 1, **more) -> DictConfig:
    """Return a run into ``folder / name`` on ``size`` processes; what it reads is written into ``folder``, once."""
    cfg = resumable_config(
        folder,
        "lora" if kind == "base" else "full",
        output_dir=str(folder / name),
        rows=ROWS[:16],
        batch_size=2 // size,
        gradient_accumulation_steps=2,
        save_every_n_steps=3,
        run_val_every_n_steps=2,
        max_val_batches=1,
        **more,
    )
    if kind in CACHES:
        if kind == "drawn ids":
            cfg.kd_loss.temperature = 1.0
        return OmegaConf.merge(cfg, NO_LIVE, {"teacher_cache": str(cache_of(cfg, kind, folder))})
    if kind.startswith("layers in "):
        return OmegaConf.merge(cfg, {"teacher_weights": kind.removeprefix("layers in ")})
    if kind in ("base", "ema"):
        entry = {"self": kind} | ({"decay": 0.8, "every_n_steps": 2} if kind == "ema" else {})
        return OmegaConf.merge(cfg, NO_LIVE, {"teachers": [entry]})
    cached = {"name": "cached", "cache": str(cache_of(cfg, "states in bf16", folder))}
    live = {"name": "live", **narrow_teacher(folder)}
    if kind == "specialists":
        halves = [dataset_section(write_rows(folder / f"half{half}.jsonl", ROWS[half:16:2])) for half in range(2)]
        entries = [entry | {"datasets": [half]} for half, entry in enumerate((cached, live))]
        cfg.dataset, cfg.dataset_val = halves, halves
        return OmegaConf.merge(cfg, NO_LIVE, {"teachers": entries})
    mix = {"ensemble": kind.removeprefix("mean of ")}
    entries = [cached | {"share": 0.25}, live | {"share": 0.75}]
    return OmegaConf.merge(cfg, NO_LIVE, mix, {"teachers": entries})


def cache_of(cfg: DictConfig, kind: str, folder: Path) -> Path:
    """Return the cache of that kind of the config's teacher, written where it is not there."""
    where = folder / f"cache of {kind}"
    if not where.is_dir():
        write(cfg, where, **CACHES[kind])
    return where


def wide_teacher(folder: Path) -> dict:
    """Return the teacher of the tiny configs, as an entry of ``teachers``."""
    section = model_section("full", TEACHER, tied=False)
    return {"model": section, "checkpointer": checkpointer_section(folder / "teacher")}


def narrow_teacher(folder: Path) -> dict:
    """Return another one, of the student's size."""
    section = model_section("full", STUDENT)
    if not (folder / "narrow").exists():
        write_checkpoint(folder / "narrow", section, seed=9)
    return {"model": section, "checkpointer": checkpointer_section(folder / "narrow")}
