"""Identify a run of a sweep: its resolved config without folders, and what is in the files that it reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtune_kd.config.checks import checkpoint_files
from torchtune_kd.config.reading import Config
from torchtune_kd.evaluation.provenance import config_sha
from torchtune_kd.storage.fingerprints import files_fingerprint
from torchtune_kd.storage.manifest import NAME as MANIFEST

_UNNAMED = "-"  # stands for every folder and file in a run's identity; what is in the files is part of it
_PATH = re.compile(r"(^|_)(dir|path|cache|files?)$")
# what changes no number of a run
_NOT_IDENTITY = (
    "batch_size_val", "keep_best", "keep_last_n", "log_every_n_steps", "log_peak_memory_stats", "metric_logger",
    "overwrite_output_dir", "profiler", "resume_from_checkpoint", "save_every_n_steps", "enable_async_checkpointing",
)  # fmt: skip


def run_id(plain: Mapping[str, Any], config: Config, devices: int, files: dict[tuple, str]) -> str:
    """Return the identity of a training run.

    Args:
        plain (Mapping[str, Any]): its config, resolved.
        config (Config): the same, read.
        devices (int): processes.
        files (dict[tuple, str]): fingerprints of files that are known already; more are added.
    """
    kept = {key: value for key, value in plain.items() if key not in _NOT_IDENTITY}
    content = {"config": _without_paths(kept), "files": _fingerprint(config, files), "devices": devices}
    return config_sha(content)[:16]


def models_id(plain: Mapping[str, Any], config: Config, models: list[str], evaluation: str | None) -> str:
    """Return the identity of an evaluation of models that no run trains."""
    kept = {name: plain.get(name) for name in ("model", "teacher_model", "tokenizer", "dtype")}
    content = {"models": models, "evaluate": evaluation, "config": _without_paths(kept)}
    return config_sha(content | {"files": _fingerprint(config, {})})[:16]


def evaluation_id(evaluate: Mapping[str, Any]) -> str | None:
    """Return the identity of what is measured: the keys, and the files that they name."""
    if not evaluate:
        return None
    named = [*evaluate.get("tasks", []), *(value for key, value in evaluate.items() if _PATH.search(str(key)))]
    files = [Path(str(name)) for name in named if isinstance(name, str) and Path(name).is_file()]
    return config_sha({"evaluate": _without_paths(evaluate), "files": files_fingerprint(files)})[:8]


def _without_paths(plain: Any, key: str = "") -> Any:
    """Return plain values without the names of folders and files, so that a run is the same on another machine."""
    if isinstance(plain, Mapping):
        return {name: _without_paths(value, str(name).rpartition(".")[2]) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_without_paths(value, key) for value in plain]
    if isinstance(plain, str) and (_PATH.search(key) or Path(plain).is_absolute()):
        return _UNNAMED
    return plain


def _fingerprint(config: Config, known: dict[tuple, str]) -> str:
    """Compute one fingerprint of the files that a run reads: weights, tokenizer and local data."""
    teachers = config.each_teacher()
    sections = [config.checkpointer, *(each.teacher_checkpointer for each in teachers)]
    paths = [path for section in sections if section is not None for path in checkpoint_files(section)]
    paths += [Path(each.teacher_cache) / MANIFEST for each in teachers if each.teacher_cache is not None]
    for section in (config.tokenizer, *config.dataset, *config.dataset_val):
        for key, value in section.arguments.items():
            if _PATH.search(str(key)):
                paths += [Path(str(path)) for path in (value if isinstance(value, list) else [value])]
    there = tuple(path for path in paths if path.is_file())
    if there not in known:
        known[there] = files_fingerprint(list(there))
    missing = [
        str(path) for path in paths if path not in there
    ]  # the recipe says so; until then a name is all there is
    return known[there] + ("" if not missing else config_sha({"missing": missing})[:16])
