"""Configs with several teachers, or with the student's own past, over random weights."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from helpers.tiny import model_section

NARROW = {"num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "embed_dim": 128, "intermediate_dim": 512}
PADDED = 64  # ids more than the student has


def members(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return entries for a ``sized_config``: its own teacher, a narrow one with a padded vocabulary, the student."""
    shape = {"vocab": cfg.teacher_model.vocab_size + PADDED, "max_seq_len": cfg.teacher_model.max_seq_len}
    return {
        "wide": {"name": "wide", "model": OmegaConf.to_container(cfg.teacher_model)},
        "narrow": {"name": "narrow", "model": model_section("full", NARROW, tied=False, **shape)},
        "base": {"self": "base"},
        "ema": {"self": "ema"},
    }


def with_teachers(cfg: DictConfig, *entries: dict[str, Any], **more: Any) -> DictConfig:
    """Return the config with these in place of its teacher."""
    less = {"teacher_model": None, "teacher_checkpointer": None, "teachers": list(entries)}
    return OmegaConf.merge(cfg, less | more)
