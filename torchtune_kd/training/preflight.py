"""What can be known to fail before a weight is read: files, folders, vocabularies, shapes, lengths."""

import json
import os
import re
import typing
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES, get_adapter_params
from torchtune.training import ModelType

from torchtune_kd.kernels._vocab import shared_vocab
from torchtune_kd.models.nf4 import check_nf4_shapes
from torchtune_kd.models.output_head import output_head
from torchtune_kd.training.components import nearest
from torchtune_kd.training.errors import UserError
from torchtune_kd.training.optim import check_optimizer
from torchtune_kd.training.random_weights import CHECKPOINTERS
from torchtune_kd.training.settings import Settings, build, one_line
from torchtune_kd.training.world import World

ATTENTION_MODULES = typing.get_args(LORA_ATTN_MODULES)
RUN_FOLDER = re.compile(r"(epoch|step)_\d+")


class DataLimits(NamedTuple):
    """What the data may hold, so that teacher and student can both read it."""

    max_seq_len: int  # tokens of the longest sequence
    vocab: int  # ids from 0 to vocab - 1


def check_run(
    cfg: DictConfig, settings: Settings, tokenizer: Any, world: World, *, resumed: bool = False
) -> DataLimits:
    """Check everything that needs neither weights nor data, and return what the data may hold.

    ``resumed`` says that the output folder holds the checkpoint with which the run goes on.

    Raises:
        UserError: at the first thing that cannot work.
    """
    if not resumed:
        check_output_folder(cfg, settings)
    check_optimizer(cfg, world.device)
    check_checkpoint_files(cfg, "checkpointer")
    student = on_meta(cfg, "model", settings, world)
    if settings.save_adapter_weights_only and not get_adapter_params(student):
        raise UserError(
            "`save_adapter_weights_only: True` needs a student with adapters, but `model` is a full-weight one: "
            "set it to False."
        )
    longest, teacher = student.max_seq_len, None
    if settings.uses_teacher:
        check_checkpoint_files(cfg, "teacher_checkpointer")
        teacher = on_meta(cfg, "teacher_model", settings, world)
        longest = min(longest, teacher.max_seq_len)
        check_tokenizer_files(cfg)
    vocab = check_vocabularies(student, teacher)
    check_tokenizer(tokenizer, vocab)
    if settings.custom_sharded_layers:
        check_sharded_layers(student, settings.custom_sharded_layers)
    return DataLimits(longest, vocab)


def on_meta(cfg: DictConfig, name: str, settings: Settings, world: World) -> TransformerDecoder:
    """The model under ``cfg.<name>`` without memory for its weights; checks NF4's shape rule on the way."""
    _check_adapters(cfg[name], name)
    with training.set_default_dtype(settings.torch_dtype), torch.device("meta"):
        try:
            model = build(cfg, name)
            unquantised = model
        except AssertionError as error:  # torchao's own check of NF4 shapes, which names no layer
            try:
                model, unquantised = None, build(cfg, name, quantize_base=False)
            except UserError:  # no such keyword, so it was another assertion
                raise UserError(f"The section `{name}` cannot be built, correct it: {one_line(error)}") from error
    if model is None or any(isinstance(parameter, NF4Tensor) for parameter in model.parameters()):
        try:
            check_nf4_shapes(unquantised, world.num_shards)
        except ValueError as error:
            raise UserError(f"The section `{name}` cannot be quantised: {one_line(error)}") from error
        if world.sharded and world.num_shards == 1:
            raise UserError(
                f"The section `{name}` is quantised, and FSDP2 shards NF4 weights over two processes or more, but here "
                "each has a copy of its own: use kd_single_device for one process, or a smaller "
                "`data_parallel_replicate_dim`."
            )
    if not isinstance(model, TransformerDecoder):
        raise UserError(
            f"Expected a text decoder (torchtune TransformerDecoder) under `{name}`, got {type(model).__name__}: "
            "name another builder."
        )
    if name == "teacher_model" and get_adapter_params(model):
        raise UserError(
            f"The builder {cfg[name]['_component_']} under `teacher_model` makes adapters, which no checkpoint would "
            "fill: name the builder without them and, under `teacher_checkpointer`, merged weights, such as the "
            "`epoch_<n>` that a LoRA recipe writes."
        )
    try:
        output_head(model)
    except ValueError as error:
        raise UserError(f"The section `{name}` does not fit: {one_line(error)}") from error
    return model


def _check_adapters(section: DictConfig, name: str) -> None:
    """torchtune's builders ignore a module that they do not know, and divide by the rank in the first step."""
    modules = section.get("lora_attn_modules", [])
    for module in modules if isinstance(modules, (list, ListConfig)) else [modules]:
        if module not in ATTENTION_MODULES:
            known = nearest(module, ATTENTION_MODULES)
            raise UserError(f"Unknown module {module!r} in `{name}.lora_attn_modules`: {known}")
    rank = section.get("lora_rank", 1)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"Expected `{name}.lora_rank` to be a whole number of at least 1, got {rank!r}: change it.")


def check_vocabularies(student: TransformerDecoder, teacher: TransformerDecoder | None) -> int:
    """Return the number of ids that teacher and student share; padded vocabularies may differ in the padding alone."""
    student_size = output_head(student)[0].shape[0]
    if teacher is None:
        return student_size
    try:
        return shared_vocab(student_size, output_head(teacher)[0].shape[0])
    except ValueError as error:
        raise UserError(f"`model` and `teacher_model` do not fit: {one_line(error)}") from error


def check_tokenizer(tokenizer: Any, vocab: int) -> None:
    """Refuse a tokenizer whose ordinary tokens, or whose padding, lie beyond the ``vocab`` ids of the models.

    Special tokens may lie beyond: text never gives torchtune's ``<|image|>`` of Llama 3, which is id 128256 where text
    models have 128256 rows. Whether the data holds one is seen row by row (``data.check_ids``).
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


def missing_tokenizer_files(cfg: DictConfig) -> list[Path]:
    """Return the files that the section ``tokenizer`` names and that are not there."""
    named = [str(value) for key, value in cfg.tokenizer.items() if re.search(r"(^|_)(path|file)$", str(key)) and value]
    return [path for path in map(Path, named) if not path.exists()]


def check_tokenizer_files(cfg: DictConfig) -> None:
    """Where both checkpoint folders hold a ``tokenizer.json``, the same words have the same ids."""
    paths = [Path(str((cfg.get(name) or {}).get("checkpoint_dir", ""))) / "tokenizer.json" for name in CHECKPOINTERS]
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


def check_checkpoint_files(cfg: DictConfig, name: str) -> None:
    """The folder and the files that a checkpointer section names exist."""
    section = cfg.get(name)
    if section is None:  # random_weights: True
        return
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
    kind = section.get("model_type", ModelType.LLAMA3_2.name)
    if kind not in ModelType.__members__:
        raise UserError(
            f"Unknown model type {kind!r} under `{name}.model_type`: {nearest(kind, ModelType.__members__)}"
        )
    files = checkpoint_files(cfg, name)
    if not files:
        raise UserError(f"Expected `{name}.checkpoint_files` to name the model's files in {folder}, but it is empty.")
    for path in files:
        if not path.is_file():
            raise UserError(f"The file {path.name} of `{name}.checkpoint_files` is not in {folder}: {hint}")


def checkpoint_files(cfg: DictConfig, name: str) -> list[Path]:
    """The weight files that a checkpointer section names."""
    section = cfg[name]
    return [Path(str(section.checkpoint_dir)) / file for file in _file_names(section.get("checkpoint_files"))]


def check_output_folder(cfg: DictConfig, settings: Settings) -> None:
    """A folder with epochs or checkpoints of an earlier run is left alone unless ``overwrite_output_dir`` is set."""
    folder = output_folder(cfg, settings)
    saved = run_folders(folder)
    if saved and not settings.overwrite_output_dir:
        steps = any(path.name.startswith("step") for path in saved)
        go_on = " set `resume_from_checkpoint: True` to go on with it," if steps else ""
        raise UserError(
            f"The output folder {folder} already holds a run ({', '.join(path.name for path in saved)}):{go_on} "
            "choose another `output_dir`, or set `overwrite_output_dir: True` to replace it when the first checkpoint "
            "is written."
        )
    for name in CHECKPOINTERS:
        source = (cfg.get(name) or {}).get("checkpoint_dir")
        if source is not None and any(Path(str(source)).resolve().is_relative_to(path.resolve()) for path in saved):
            raise UserError(
                f"`{name}.checkpoint_dir` is {source}, which `overwrite_output_dir: True` would replace: "
                "choose another `output_dir`."
            )


def check_shared_folder(folder: Path, settings: Settings, world: World) -> None:
    """Where checkpoints are written or read, all processes see the same output folder.

    Raises:
        UserError: on every process, if one of them does not find what rank 0 puts there, or rank 0 cannot.
    """
    if not world.sharded or (
        settings.save_every_n_steps is None and settings.keep_best is None and not settings.resume_from_checkpoint
    ):
        return
    mark, why = folder / f".seen_{uuid.uuid4().hex}", None
    if world.is_rank_zero:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            why = one_line(error)
    name, why = world.gather((mark.name, why))[0]
    blind = [rank for rank, seen in enumerate(world.gather(os.path.isfile(folder / name))) if not seen]
    if why is not None:
        raise UserError(f"Expected an `output_dir` that can be written, got {folder}: {why}.")
    if world.is_rank_zero:
        mark.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"Expected `output_dir` to be one folder for all processes, but what rank 0 writes into {folder} is not "
            f"there for {'rank' if len(blind) == 1 else 'ranks'} {', '.join(map(str, blind))}: put it on a file "
            "system that all nodes share, or save and resume nothing."
        )


def output_folder(cfg: DictConfig, settings: Settings) -> Path:
    """Where checkpoints go."""
    return Path(str((cfg.get("checkpointer") or {}).get("output_dir", settings.output_dir)))


def run_folders(folder: Path) -> list[Path]:
    """The epochs and checkpoints that a run has written into ``folder``."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if RUN_FOLDER.fullmatch(path.name))


def check_sharded_layers(student: TransformerDecoder, names: list[str]) -> None:
    """The loss reads the head outside the head's own forward, so FSDP must not gather it by itself."""
    modules = dict(student.named_modules())
    weight = output_head(student)[0]
    for name in names:
        if name not in modules:
            raise UserError(f"`custom_sharded_layers` names {name}, which `model` has not: delete it.")
        if isinstance(modules[name], nn.ModuleList):
            raise UserError(
                f"`custom_sharded_layers` names {name}, a list of layers sharded anyway: delete that entry."
            )
        if any(parameter is weight for parameter in modules[name].parameters()) or name == "output":
            raise UserError(
                f"`custom_sharded_layers` names {name}, which holds the output head; the loss reads the head "
                "together with the whole model: delete that entry."
            )


def _file_names(files: Any) -> Iterator[str]:
    if isinstance(files, ListConfig):
        yield from (str(file) for file in files)
    elif isinstance(files, DictConfig):  # torchtune's short form: filename_format and max_filename
        section = OmegaConf.to_container(files)
        yield from training.FormattedCheckpointFiles.from_dict(section).build_checkpoint_filenames()


def _token_ids(path: Path) -> dict[str, int]:
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
