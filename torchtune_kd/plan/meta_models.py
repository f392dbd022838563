"""The student and its teachers on the meta device, ready for a dry step, and what they consist of."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import modules, training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_kd.caches.layout import CacheManifest, to_be_written
from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.config.teachers import TeacherEntry
from torchtune_kd.distributed.world import World
from torchtune_kd.kernels import float8_weight
from torchtune_kd.losses.signals import Head
from torchtune_kd.models.build import check_vocabularies, on_meta
from torchtune_kd.models.float8_head import replace_head
from torchtune_kd.models.output_head import output_head
from torchtune_kd.models.quantised_body import Int8Linear, quantise_body
from torchtune_kd.plan.tracker import tensor_bytes
from torchtune_kd.training.teachers import check_joint_cache, check_own


class StoredTeacher(nn.Module):
    """Hold what a run does of a teacher whose signals come from a cache, on the meta device: the head, or nothing.

    Args:
        manifest (CacheManifest): of the cache.
        computed_in (torch.dtype): of the run.

    Attributes:
        manifest (CacheManifest): the same.
        computed_in (torch.dtype): the same.
    """

    max_seq_len = 2**31  # a cache holds documents of any length
    layers = ()

    def __init__(self, manifest: CacheManifest, computed_in: torch.dtype) -> None:
        super().__init__()
        self.manifest, self.computed_in = manifest, computed_in
        self.weight = self.bias = None
        if manifest.kind == "hidden":
            whole = {"dtype": computed_in, "device": "meta"}
            weight = torch.empty(manifest.vocab, manifest.width, **whole)
            self.weight = nn.Parameter(weight, requires_grad=False)
            bias = torch.empty(manifest.vocab, **whole) if manifest.has_bias else None
            self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


@dataclass(frozen=True)
class MetaTeacher:
    """Hold the weights of a teacher.

    Attributes:
        model (TransformerDecoder | StoredTeacher | None): its decoder with rotary tables; of one whose signals come
            from a cache the head at most; None where the student itself teaches.
        config (Config | None): the run's, as if this teacher were its only one; None where the student itself teaches.
        head (Head | None): in 8-bit floats, where the model has lost its own to :func:`as_run`.
        entry (TeacherEntry | None): out of ``teachers``; None of ``teacher_model`` or ``teacher_cache``.
    """

    model: TransformerDecoder | StoredTeacher | None
    config: Config | None = None
    head: Head | None = None
    entry: TeacherEntry | None = None

    @property
    def name(self) -> str:
        return "teacher" if self.entry is None else self.entry.name

    @property
    def own(self) -> str | None:
        """Return "base" or "ema" where the student itself teaches."""
        return None if self.entry is None else self.entry.own

    @property
    def manifest(self) -> CacheManifest | None:
        """Return what its cache holds, where there is one."""
        return self.model.manifest if isinstance(self.model, StoredTeacher) else None

    @property
    def head_tensors(self) -> list[Tensor]:
        """Return what the head in 8-bit floats consists of; nothing where it has none."""
        if self.head is None:
            return []
        weight, bias = self.head
        return [tensor for tensor in (*weight, bias) if tensor is not None]


@dataclass(frozen=True)
class Models:
    """Hold the student, its trainable parameters marked, and its teachers, one or several; none at kd_ratio 0."""

    student: TransformerDecoder
    teachers: tuple[MetaTeacher, ...] = ()

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    @property
    def own(self) -> str | None:
        """Return "base" or "ema" where the student is one of its teachers."""
        return next((teacher.own for teacher in self.teachers if teacher.own is not None), None)

    @property
    def others(self) -> list[MetaTeacher]:
        """Return the teachers that are not the student."""
        return [teacher for teacher in self.teachers if teacher.model is not None]

    @property
    def caches(self) -> list[tuple[Config, CacheManifest]]:
        """Return what each cache holds, with the config as if it were the only teacher."""
        return [(teacher.config, teacher.manifest) for teacher in self.others if teacher.manifest is not None]

    def shared_ids(self) -> int:
        """Return the number of ids that all models score.

        Raises:
            UserError: if a teacher's vocabulary is not the student's.
        """
        sizes = (teacher.manifest.vocab if teacher.manifest else teacher.model for teacher in self.teachers)
        return min(check_vocabularies(self.student, size) for size in (*sizes, None))


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights (elements, whatever they are held in); the student's adapters are part of ``student``.

    ``teacher`` counts all teachers; see :func:`teacher_parameters`.
    """

    teacher: int
    student: int
    adapters: int
    trained: int


def build_models(config: Config, shards: int = 1) -> Models:
    """Build all models as the recipe would build them, on the meta device.

    Args:
        config (Config): the run's.
        shards (int): processes that share one copy of the weights, for NF4's rule of shapes; 1 shards nothing.

    Raises:
        UserError: if one cannot be built, a cache is not there or cannot be one of several teachers, the student
            cannot teach itself, or vocabularies differ.
    """
    settings = config.settings
    on_host = replace(settings, device="cpu")  # shapes need no GPU
    world = World(torch.device("cpu"), size=shards, sharded=shards > 1)
    student = on_meta(config.model, on_host, world)
    if adapters := get_adapter_params(student):
        set_trainable_params(student, adapters)
    _make_runnable(student)
    teachers = ()
    if settings.uses_teacher:
        check_own(config, student)
        teachers = tuple(_teacher(config, entry, on_host, world) for entry in config.teachers or (None,))
    models = Models(student, teachers)
    for each, manifest in models.caches:
        check_joint_cache(config, each, manifest)
    models.shared_ids()
    if settings.enable_activation_checkpointing:
        training.set_activation_checkpointing(student, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    return models


def _teacher(config: Config, entry: TeacherEntry | None, on_host: Settings, world: World) -> MetaTeacher:
    if entry is not None and entry.own is not None:
        return MetaTeacher(None, entry=entry)
    alone = config if entry is None else config.with_teacher(entry)
    return MetaTeacher(_weights(alone, on_host, world), alone, entry=entry)


def _weights(config: Config, on_host: Settings, world: World) -> TransformerDecoder | StoredTeacher:
    """Return what a run holds of the one teacher of a config."""
    if not config.runs_teacher:
        return _stored_teacher(config, on_host, world)
    teacher = on_meta(config.teacher_model, on_host, world).requires_grad_(False)
    if config.teacher_weights is not None:
        quantise_body(teacher, config.teacher_weights, world.num_shards)
    _make_runnable(teacher)
    return teacher


def _stored_teacher(config: Config, on_host: Settings, world: World) -> StoredTeacher:
    """Return what is held of a cache that is there; of one that is yet to be written, ``teacher_model``'s states."""
    folder = Path(str(config.teacher_cache))
    if config.teacher_model is None or folder.is_dir():
        return StoredTeacher(CacheManifest.read(folder), on_host.torch_dtype)
    weight, bias = output_head(on_meta(config.teacher_model, on_host, world))
    return StoredTeacher(to_be_written(weight.shape, has_bias=bias is not None), on_host.torch_dtype)


def as_run(models: Models) -> Models:
    """Return the models as the recipe holds them while it runs, each teacher with its ``teacher_head``.

    Raises:
        UserError: if a teacher's head cannot be quantised.
    """
    return replace(models, teachers=tuple(map(_with_head, models.teachers)))


def _with_head(teacher: MetaTeacher) -> MetaTeacher:
    if teacher.config is None or teacher.config.teacher_head is None:
        return teacher
    model = copy.deepcopy(teacher.model)
    if isinstance(model, StoredTeacher):
        head = Head(float8_weight(model.weight.detach()), None if model.bias is None else model.bias.detach())
        model.weight = model.bias = None
    else:
        head = replace_head(model, lambda name: model.get_parameter(name).detach())
    return replace(teacher, model=model, head=head)


def teacher_parameters(models: Models) -> tuple[int, ...]:
    """Return the number of weights that each teacher has beside the student's: an average has its trained ones."""
    own = {"base": 0, "ema": _count(models.trainable)}
    return tuple(own[each.own] if each.own is not None else _count(_numbers(each.model)) for each in models.teachers)


def count_parameters(models: Models) -> Parameters:
    return Parameters(
        teacher=sum(teacher_parameters(models)),
        student=_count(models.student.parameters()),
        adapters=_count(get_adapter_params(models.student).values()),
        trained=_count(models.trainable),
    )


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of all parameters, NF4 with its scales, and of the tables."""
    return sum(map(tensor_bytes, model.parameters())) + table_bytes(model)


def table_bytes(model: nn.Module) -> int:
    """Rotary tables, each once: buffers that every process holds whole."""
    return sum(map(tensor_bytes, {id(buffer): buffer for buffer in model.buffers()}.values()))


def _numbers(model: nn.Module) -> Iterator[Tensor]:
    """Yield all parameters, of 8-bit layers the weights that they stand for, without the rows' scales."""
    in_8_bits = [module for module in model.modules() if isinstance(module, Int8Linear)]
    as_held = {id(part) for layer in in_8_bits for part in (layer.weight, layer.scale)}
    yield from (parameter for parameter in model.parameters() if id(parameter) not in as_held)
    for layer in in_8_bits:
        yield layer.quantised()[0]


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _make_runnable(model: TransformerDecoder) -> None:
    """Give Llama 3's rotary embeddings the table that they cannot compute without values, and pick flash attention.

    That is what PyTorch picks on CUDA in bf16 and on the CPU; from meta tensors it cannot tell. What it keeps for the
    backward pass (and what memory-efficient attention, for fp32, keeps) is the same.
    """
    for layer in model.layers:
        rotary = layer.attn.pos_embeddings
        if rotary is not None and not getattr(rotary, "is_cache_built", True):
            frequencies = torch.empty(rotary.dim // 2, dtype=torch.float32, device="meta")
            rotary.register_buffer("theta", frequencies, persistent=False)
            table = frequencies.new_empty(rotary.max_seq_len, rotary.dim // 2, 2)
            rotary.register_buffer("cache", table, persistent=False)
            rotary.is_cache_built = True
        layer.attn._attention_call = _flash_attention


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
