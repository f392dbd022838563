"""Build models from their sections: on the meta device to check them, and the student with its weights.

One path for full-weight, LoRA, DoRA and QLoRA students: what the student is follows from its builder.
"""

import typing
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import modules, training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES, get_adapter_params, set_trainable_params

from torchtune_kd._torchtune import keep_dequantised_weights_on_host
from torchtune_kd.config.sections import Section
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.sharding import shard
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, loading, nearest, one_line
from torchtune_kd.kernels import shared_vocab
from torchtune_kd.losses import KDLoss
from torchtune_kd.models.adapters import initial_adapters, leave_biases_unscaled
from torchtune_kd.models.loading import check_weights, load
from torchtune_kd.models.nf4 import check_nf4_shapes
from torchtune_kd.models.output_head import output_head
from torchtune_kd.models.random_weights import NoInitialValues, RandomWeights
from torchtune_kd.models.student import Student

ATTENTION_MODULES = typing.get_args(LORA_ATTN_MODULES)


def on_meta(section: Section, settings: Settings, world: World) -> TransformerDecoder:
    """Build the model of a section without memory for its weights, and check NF4's rule of shapes on the way."""
    name = section.path
    _check_adapters(section)
    with training.set_default_dtype(settings.torch_dtype), torch.device("meta"):
        try:
            model = section.build()
            unquantised = model
        except AssertionError as error:  # torchao's own check of NF4 shapes, which names no layer
            try:
                model, unquantised = None, section.build(quantize_base=False)
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
    if name != "model" and get_adapter_params(model):
        raise UserError(
            f"The builder {section.component} under `{name}` makes adapters, which no checkpoint would "
            "fill: name the builder without them and, under `teacher_checkpointer`, merged weights, such as the "
            "`epoch_<n>` that a LoRA recipe writes."
        )
    try:
        output_head(model)
    except ValueError as error:
        raise UserError(f"The section `{name}` does not fit: {one_line(error)}") from error
    return model


def _check_adapters(section: Section) -> None:
    """Refuse what torchtune's builders let through: unknown modules are ignored, a rank of 0 divides in a step."""
    modules = section.get("lora_attn_modules", [])
    for module in modules if isinstance(modules, list) else [modules]:
        if module not in ATTENTION_MODULES:
            known = nearest(module, ATTENTION_MODULES)
            raise UserError(f"Unknown module {module!r} in `{section.path}.lora_attn_modules`: {known}")
    rank = section.get("lora_rank", 1)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(
            f"Expected `{section.path}.lora_rank` to be a whole number of at least 1, got {rank!r}: change it."
        )


def check_vocabularies(student: TransformerDecoder, teacher: TransformerDecoder | int | None) -> int:
    """Return the number of ids that teacher and student share; padded vocabularies may differ in the padding alone.

    Args:
        student (TransformerDecoder): on any device.
        teacher (TransformerDecoder | int | None): on any device; of a cached one, its number of ids.
    """
    student_size = output_head(student)[0].shape[0]
    if teacher is None:
        return student_size
    cached = isinstance(teacher, int)
    try:
        return shared_vocab(student_size, teacher if cached else output_head(teacher)[0].shape[0])
    except ValueError as error:
        name = "teacher_cache" if cached else "teacher_model"
        raise UserError(f"`model` and `{name}` do not fit: {one_line(error)}") from error


def check_sharded_layers(student: TransformerDecoder, names: list[str]) -> None:
    """Refuse to shard the head by itself: the loss reads it outside the head's own forward."""
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


def build_student(
    section: Section,
    settings: Settings,
    world: World,
    kd_loss: KDLoss,
    weights: Mapping[str, Tensor] | None,
    seed: int,
) -> Student:
    """Build the student with ``weights`` (None: random ones), in the run's dtype.

    Its adapters are trainable if it has any, else all of it.
    """
    keep_dequantised_weights_on_host(settings.low_cpu_ram)
    with loading("student", world.device):
        decoder = build_decoder(section, settings, world)
        if weights is None:
            weights = RandomWeights(decoder, section.path, settings.torch_dtype, settings.seed or 0)
        check_weights(decoder, weights, "checkpointer")
        leave_biases_unscaled(decoder)
        adapters = get_adapter_params(decoder)
        if adapters:
            set_trainable_params(decoder, adapters)
        student = Student(decoder, kd_loss, settings.kd_ratio).train()
        if settings.compile:
            training.compile_model(decoder, verbose=world.is_rank_zero)
        if settings.enable_activation_checkpointing:
            training.set_activation_checkpointing(decoder, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
        adapter_weights = initial_adapters(decoder, weights, settings.torch_dtype, seed) if world.reads_files else {}
        if world.sharded:
            shard(student, settings, world, extra_layers=settings.custom_sharded_layers)
            register_fsdp_forward_method(student, "teach")
            student.keeps_layers_gathered = not settings.fsdp_reshard_after_forward
        load(decoder, weights, adapter_weights, settings, world)
    student.offload_activations = training.get_act_offloading_ctx_manager(
        decoder, settings.enable_activation_offloading
    )
    return student


def build_decoder(
    section: Section, settings: Settings, world: World, *, quantised_later: bool = False
) -> TransformerDecoder:
    """Build a decoder for its weights to be loaded: on the meta device where it will be sharded, or quantised."""
    device = torch.device("meta") if world.sharded or quantised_later else world.device
    with training.set_default_dtype(settings.torch_dtype), device, NoInitialValues():
        return section.build()
