"""Find what can be known to fail from a config and the files that it names: sections, checkpoints, tokenizers."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import training
from torchtune.training import ModelType

from torchtune_kd.config.sections import Section
from torchtune_kd.config.settings import REQUIRED_COMPONENTS, TEACHER_COMPONENTS, TEACHER_HEADS, TEACHER_WEIGHTS
from torchtune_kd.errors import UserError, nearest
from torchtune_kd.losses import KDLoss, KDWithChunkedOutputLoss

CHECKPOINTERS = ("checkpointer", "teacher_checkpointer")


def check_tokenizer(tokenizer: Any, vocab: int) -> None:
    """Refuse a tokenizer whose ordinary tokens, or whose padding, lie beyond the ``vocab`` ids of the models.

    Special tokens may lie beyond: text never gives torchtune's ``<|image|>`` of Llama 3, which is id 128256 where text
    models have 128256 rows. Whether the data holds one is seen row by row (``data.batches.check_ids``).
    """
    size = getattr(tokenizer, "vocab_size", None)
    special = getattr(tokenizer, "special_tokens", None)
    beyond = [index for index in special.values() if index >= vocab] if isinstance(special, Mapping) else []
    if size is not None and size - len(set(beyond)) > vocab:
        raise UserError(
            f"Expected a tokenizer of the models' {vocab} ids, but the one under `tokenizer` has {size}: name the "
            "tokenizer of these models."
        )
    if not 0 <= tokenizer.pad_id < vocab:
        raise UserError(
            f"Expected the tokenizer's padding to be one of the models' {vocab} ids, but it is {tokenizer.pad_id}: "
            "name the tokenizer of these models."
        )


def missing_tokenizer_files(tokenizer: Section) -> list[Path]:
    """Return the files that the section names and that are not there."""
    arguments = tokenizer.arguments.items()
    named = [str(value) for key, value in arguments if re.search(r"(^|_)(path|file)$", str(key)) and value]
    return [path for path in map(Path, named) if not path.exists()]


def check_tokenizer_files(checkpointers: Iterable[Section | None]) -> None:
    """Refuse models whose folders hold, both, a ``tokenizer.json``, and not the same ids for the same words."""
    folders = [checkpointer.get("checkpoint_dir", "") for checkpointer in checkpointers if checkpointer is not None]
    paths = [Path(str(folder)) / "tokenizer.json" for folder in folders]
    if len(paths) < 2:
        return
    if not all(path.is_file() for path in paths):
        return
    student, teacher = map(_token_ids, paths)
    for token, index in student.items():
        if teacher.get(token, index) != index:
            raise UserError(
                f"The token {token!r} is id {index} in {paths[0]} and id {teacher[token]} in {paths[1]}: teacher and "
                "student need the same tokenizer; choose models of one family."
            )
    unshared = len(student.keys() ^ teacher.keys())
    if unshared > max(len(student), len(teacher)) // 100:
        raise UserError(
            f"{unshared} tokens stand in only one of {paths[0]} ({len(student)} tokens) and {paths[1]} "
            f"({len(teacher)}): teacher and student need the same tokenizer; choose models of one family."
        )


def check_checkpoint_files(section: Section | None) -> None:
    """Refuse a checkpointer whose folder or files are not there, or that asks for what a run does not start from."""
    if section is None:  # random_weights: True
        return
    name = section.path
    for key in ("adapter_checkpoint", "recipe_checkpoint"):
        if section.get(key) is not None:
            raise UserError(
                f"Expected `{name}.{key}: null`, since a run starts from whole weights: merge the adapter first."
            )
    for key in ("should_load_recipe_state", "resume_from_checkpoint"):
        if section.get(key):
            raise UserError(
                f"Expected `{name}.{key}: False`, since torchtune's recipe state holds no position in the data: set "
                "`resume_from_checkpoint: True` at the top of the config, which goes on with the newest `step_<n>`."
            )
    folder = section.get("checkpoint_dir")
    if folder is None:
        raise UserError(f"Expected `{name}.checkpoint_dir` in the config, but it is missing: add it.")
    folder = Path(str(folder))
    hint = f"fetch the model (`tune download`, see the head of the config) or change `{name}.checkpoint_dir`."
    if not folder.is_dir():
        raise UserError(f"The folder {folder} of `{name}.checkpoint_dir` does not exist: {hint}")
    kind = section.get("model_type", "LLAMA3_2")
    if kind not in ModelType.__members__:
        raise UserError(
            f"Unknown model type {kind!r} under `{name}.model_type`: {nearest(kind, ModelType.__members__)}"
        )
    files = checkpoint_files(section)
    if not files:
        raise UserError(f"Expected `{name}.checkpoint_files` to name the model's files in {folder}, but it is empty.")
    for path in files:
        if not path.is_file():
            raise UserError(f"The file {path.name} of `{name}.checkpoint_files` is not in {folder}: {hint}")


def checkpoint_files(section: Section) -> list[Path]:
    """Return the weight files that a checkpointer section names."""
    return [Path(str(section.get("checkpoint_dir"))) / file for file in _file_names(section.get("checkpoint_files"))]


def _file_names(files: Any) -> Iterator[str]:
    if isinstance(files, list):
        yield from (str(file) for file in files)
    elif isinstance(files, dict):  # torchtune's short form: filename_format and max_filename
        yield from training.FormattedCheckpointFiles.from_dict(files).build_checkpoint_filenames()


def _token_ids(path: Path) -> dict[str, int]:
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def check_random_weights(written: DictConfig, *, asked: bool, runs_teacher: bool) -> None:
    """Refuse a model without a checkpoint that is not meant so, and a ``random_weights`` without a use.

    Args:
        written (DictConfig): a run's config.
        asked (bool): its ``random_weights``.
        runs_teacher (bool): whether a teacher runs in it.

    Raises:
        UserError: for one without the other.
    """
    used = CHECKPOINTERS if runs_teacher else CHECKPOINTERS[:1]
    null = [name for name in used if name in written and written[name] is None]
    if null and not asked:
        raise UserError(
            f"`{null[0]}: null` leaves a model without weights: name a checkpoint, or set `random_weights: True` to "
            "run with random ones of the true shapes."
        )
    if asked and all(written.get(name) is not None for name in used):
        raise UserError(
            "`random_weights: True` is for models without a checkpoint, but "
            f"{' and '.join(f'`{name}`' for name in used)} name{'s' * (len(used) == 1)} files: set "
            f"`{used[0]}: null` or delete `random_weights`."
        )


def check_needed_sections(written: DictConfig, *, runs_teacher: bool, random_weights: bool) -> None:
    """Refuse a config without a section that its run needs."""
    for name in REQUIRED_COMPONENTS + (TEACHER_COMPONENTS if runs_teacher else ()):
        if written.get(name) is None and not (random_weights and name in CHECKPOINTERS):
            raise UserError(f"Expected the section `{name}` in the config, but it is missing: add it.")


def check_teacher_head(written: DictConfig) -> None:
    """Refuse a ``teacher_head`` or ``teacher_weights`` that there is not; the latter needs a teacher that runs."""
    for key, words in (("teacher_head", TEACHER_HEADS), ("teacher_weights", TEACHER_WEIGHTS)):
        name = written.get(key)
        if name is not None and name not in words:
            raise UserError(f"Expected `{key}` to be {' or '.join(words)} or null, got {name!r}: change it.")
    if written.get("teacher_weights") is not None and written.get("teacher_cache") is not None:
        raise UserError(
            "`teacher_weights` is for a teacher that runs, but there is a `teacher_cache`: delete one of them."
        )


def check_teacher_cache(written: DictConfig) -> None:
    """Refuse a ``teacher_cache`` that names no folder, and a ``teacher_tail`` without a use."""
    folder = written.get("teacher_cache")
    if folder is not None and not (isinstance(folder, str) and folder):
        raise UserError(f"Expected `teacher_cache` to be a folder or null, got {folder!r}: change it.")
    tail = written.get("teacher_tail")
    if tail is not None and (tail != "renormalise" or folder is None):
        raise UserError(
            f"Expected `teacher_tail` to be renormalise, beside a `teacher_cache` of the likeliest ids, or null, got "
            f"{tail!r}: change it."
        )


def check_kd_loss(section: Section) -> None:
    """Refuse what is no loss that works from hidden states under ``kd_loss``."""
    component = section.resolve()
    if inspect.isclass(component) and issubclass(component, KDWithChunkedOutputLoss):
        raise UserError(
            f"`kd_loss._component_` is {section.component}, which is for torchtune's own recipes; this one never "
            f"holds full logits, so write {section.component.replace('WithChunkedOutputLoss', 'Loss')} and "
            "delete `kd_loss.num_output_chunks`."
        )
    if not (inspect.isclass(component) and issubclass(component, KDLoss)) or component is KDLoss:
        raise UserError(
            f"Expected a loss of torchtune_kd.losses under `kd_loss`, got {section.component}: "
            "write for example `kd_loss._component_: torchtune_kd.losses.ForwardKLLoss`."
        )
