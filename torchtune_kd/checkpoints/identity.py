"""What a run depends on, in a form that can be compared later: files by their content, not by where they lie."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from torchtune_kd.config.checks import checkpoint_files
from torchtune_kd.config.reading import Config
from torchtune_kd.config.sections import Section
from torchtune_kd.data.datasets import read_row
from torchtune_kd.storage.fingerprints import files_fingerprint

ROWS = 256  # rows of a dataset that are read, evenly spread

GROUPS = ("teacher", "student", "tokenizer", "data", "loss", "training")


def run_identity(
    config: Config,
    dataset: Dataset,
    *,
    seed: int,
    sequences_per_step: int,
    teacher: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return everything that changes a run's numbers, in :data:`GROUPS`, each from a dotted key to a plain value.

    Paths are left out: files count by a fingerprint of what is in them. What changes no number (logging, devices,
    sharding, activation checkpointing) is left out too.

    Args:
        config (Config): the run's.
        dataset (Dataset): what its sections have built.
        seed (int): the seed in use, drawn where the config has none.
        sequences_per_step (int): rows of one optimizer step over all processes.
        teacher (Mapping[str, Any]): what there is to say of its teachers.
    """
    settings = config.settings
    student = _leaves(config.model) | {"dtype": settings.dtype}
    student["weights that the student starts from"] = weights_fingerprint(config.checkpointer)
    data = _leaves(*config.dataset) | {"rows of the dataset": len(dataset)}
    data |= {"content of the dataset": dataset_fingerprint(config.dataset, dataset)}
    data |= {"shuffle": settings.shuffle, "seed": seed}
    return {
        "teacher": dict(teacher),
        "student": student,
        "tokenizer": tokenizer_identity(config),
        "data": data,
        "loss": _leaves(config.kd_loss) | {"kd_ratio": settings.kd_ratio},
        "training": _leaves(config.optimizer, config.lr_scheduler)
        | {name: getattr(settings, name) for name in ("epochs", "max_steps_per_epoch", "max_minutes", "clip_grad_norm")}
        | {"sequences per step (batch_size x gradient_accumulation_steps x processes)": sequences_per_step},
    }


def teacher_identity(config: Config, *, weights: bool = True) -> dict[str, Any]:
    """Return what a teacher's hidden states depend on, beside the tokens: its builder and, with ``weights``, those."""
    builder = _leaves(config.teacher_model)
    if config.teacher_weights is not None:
        builder["teacher_weights"] = config.teacher_weights
    if not weights:
        return builder
    return builder | {"weights of the teacher": weights_fingerprint(config.teacher_checkpointer)}


def tokenizer_identity(config: Config) -> dict[str, Any]:
    """Return what the ids of a text depend on."""
    return _leaves(config.tokenizer) | tokenizer_files(config)


def tokenizer_files(config: Config) -> dict[str, Any]:
    """Return the part of :func:`tokenizer_identity` that is in files: what gives ids to words."""
    return {"files of the tokenizer": files_fingerprint(_paths(config.tokenizer.plain))}


def differences(then: Mapping[str, Any], now: Mapping[str, Any], groups: tuple[str, ...] = GROUPS) -> list[str]:
    """Name whatever differs between two identities: ``key (old value then, new value now)``."""
    found = []
    for group in groups:
        old, new = then.get(group, {}), json.loads(json.dumps(now.get(group, {})))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                name = key if " " in key else f"`{key}`"
                found.append(f"{name} ({_shown(old.get(key))} then, {_shown(new.get(key))} now)")
    return found


def weights_fingerprint(section: Section | None) -> str:
    """Return a fingerprint of the files that a checkpointer section reads, in their order."""
    return "random" if section is None else files_fingerprint(checkpoint_files(section))


def dataset_fingerprint(sections: Sequence[Section], dataset: Dataset) -> str:
    """Return one of the local files that the sections name, and of :data:`ROWS` rows as the models will see them."""
    digest = hashlib.sha256(files_fingerprint(_paths([section.plain for section in sections])).encode())
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(ROWS, len(dataset)), dtype=np.int64))
    for index in rows.tolist():
        sample = read_row(dataset, index, "dataset")
        for key in ("tokens", "labels", "seq_lens"):
            values = sample.get(key, ())
            values = values.tolist() if isinstance(values, Tensor) else list(values)
            digest.update(json.dumps([key, values], default=str).encode())
    return digest.hexdigest()[:16]


def _leaves(*sections: Section | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section in filter(None, sections):
        found |= _flat(section.path, section.plain)
    return found


def _flat(path: str, node: Any) -> dict[str, Any]:
    """Return the leaves of a section by dotted key, without names of files and absolute ones of folders."""
    if isinstance(node, dict):
        return {key: value for k, v in node.items() for key, value in _flat(f"{path}.{k}", v).items()}
    if isinstance(node, list):
        return {key: value for i, v in enumerate(node) for key, value in _flat(f"{path}[{i}]", v).items()}
    if node is None or (isinstance(node, str) and (Path(node).is_absolute() or _is_file(Path(node)))):
        return {}
    return {path: node}


def _paths(node: Any) -> list[Path]:
    """Return the local files that strings of a section name."""
    return [path for path in map(Path, _strings(node)) if _is_file(path)]


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _strings(value)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a string too long to be a name
        return False


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
