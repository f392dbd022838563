"""Build teacher and student, load their weights, and shard them where the run has several processes.

One path for full-weight, LoRA, DoRA and QLoRA students: what the student is follows from its builder.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torchtune.modules.common_utils as common_utils
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import modules, training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params

from torchtune_kd.kernels import linear_kd_loss
from torchtune_kd.losses import KDLoss
from torchtune_kd.models.output_head import output_head, skip_output_head
from torchtune_kd.training.errors import UserError
from torchtune_kd.training.settings import Settings, build, one_line
from torchtune_kd.training.world import World


class HostTensor:
    """A tensor that FSDP2 leaves on the host; it moves every tensor among a root's arguments to the device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Teacher(nn.Module):
    """A frozen decoder that gives its last hidden states [B, S, D] and, beside them, the head that reads them.

    Under FSDP2 this module is the root. Its own parameters (embedding, norm, head) are gathered by the first
    forward of a step and stay so until :meth:`release`: the head travels once per step.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = skip_output_head(decoder).eval()
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor, **attention: Any) -> Tensor:
        return self.decoder(tokens, **attention)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight [V, D] and bias [V] or None; valid after a forward and before :meth:`release`."""
        weight, bias = output_head(self.decoder)
        return weight.detach(), None if bias is None else bias.detach()

    def release(self) -> None:
        """End of a step: give the gathered parameters back."""
        reshard(self)


class Student(nn.Module):
    """A decoder and its loss in one module.

    The loss is computed inside ``forward`` because, under FSDP2, only there the head is a plain gathered tensor
    whose gradient goes through FSDP's own reduction (this module is the FSDP root).
    """

    def __init__(self, decoder: TransformerDecoder, kd_loss: KDLoss, kd_ratio: float) -> None:
        super().__init__()
        self.decoder = skip_output_head(decoder)
        self.kd_ratio = kd_ratio
        self._objective = kd_loss.settings()
        self.offload_activations = contextlib.nullcontext()
        self.keeps_layers_gathered = False  # between the microbatches of a step, under FSDP2

    def forward(
        self,
        tokens: Tensor,
        labels: HostTensor,
        teacher_hidden: Tensor | None,
        teacher_head: tuple[Tensor, Tensor | None] | None,
        metrics: tuple[str, ...],
        **attention: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one microbatch, summed over its valid tokens.

        Args:
            tokens (Tensor): [B, S] ids.
            labels (HostTensor): [B, S] next-token ids, already shifted; ``ignore_index`` where there is none.
            teacher_hidden (Tensor | None): [B, S, D_t] last hidden states; None at kd_ratio 0.
            teacher_head (tuple[Tensor, Tensor | None] | None): weight [V_t, D_t] and bias [V_t]; None at kd_ratio 0.
            metrics (tuple[str, ...]): names out of ``torchtune_kd.kernels.METRICS``.
            **attention: ``mask`` and ``input_pos`` of packed data.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: 0-d loss sum with its graph, and the metrics' sums (0-d, fp32).
        """
        with self.offload_activations:
            hidden = self.decoder(tokens, **attention)
        weight, bias = output_head(self.decoder)
        teacher_weight, teacher_bias = teacher_head or (None, None)
        return linear_kd_loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            labels.tensor,
            student_bias=bias,
            teacher_bias=teacher_bias,
            kd_ratio=self.kd_ratio,
            reduction="sum",
            return_metrics=metrics,
            **self._objective,
        )


def build_teacher(cfg: DictConfig, settings: Settings, world: World) -> Teacher | None:
    """The teacher with its weights, frozen, in the run's dtype; None at kd_ratio 0."""
    if not settings.uses_teacher:
        return None
    _, weights = load_weights(cfg.teacher_checkpointer, "teacher_checkpointer")
    decoder = _build_decoder(cfg, "teacher_model", settings, world)
    check_weights(decoder, weights, "teacher_checkpointer")
    teacher = Teacher(decoder)
    if settings.compile:
        training.compile_model(decoder, verbose=world.is_rank_zero)
    if world.sharded:
        _shard(teacher, settings, extra_layers=None)
        _load_sharded(decoder, weights, settings, world)
    else:
        decoder.load_state_dict(weights)
    return teacher


def build_student(
    cfg: DictConfig,
    settings: Settings,
    world: World,
    kd_loss: KDLoss,
    weights: Mapping[str, Tensor],
    seed: int,
) -> Student:
    """The student with its weights, and with trainable parameters marked: its adapters if it has any, else all."""
    common_utils._use_low_cpu_ram = settings.low_cpu_ram
    decoder = _build_decoder(cfg, "model", settings, world)
    check_weights(decoder, weights, "checkpointer")
    adapters = get_adapter_params(decoder)
    if adapters:
        set_trainable_params(decoder, adapters)
    student = Student(decoder, kd_loss, settings.kd_ratio).train()
    if settings.compile:
        training.compile_model(decoder, verbose=world.is_rank_zero)
    if settings.enable_activation_checkpointing:
        training.set_activation_checkpointing(decoder, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    weights = {**weights, **_initial_adapters(decoder, weights, settings.torch_dtype, seed)}
    if world.sharded:
        _shard(student, settings, extra_layers=settings.custom_sharded_layers)
        student.keeps_layers_gathered = not settings.fsdp_reshard_after_forward
        _load_sharded(decoder, weights, settings, world)
    else:
        decoder.load_state_dict(weights, strict=False)  # names and shapes were compared above
    student.offload_activations = training.get_act_offloading_ctx_manager(
        decoder, settings.enable_activation_offloading
    )
    return student


def reshard(root: nn.Module) -> None:
    """Give back every gathered parameter below ``root``, where it is sharded at all."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_weights(cfg_checkpointer: DictConfig, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A checkpointer and the model weights that it reads, by torchtune's parameter names."""
    checkpointer = build({name: cfg_checkpointer}, name)
    try:
        return checkpointer, checkpointer.load_checkpoint()[training.MODEL_KEY]
    except (ValueError, OSError, KeyError) as error:
        folder = cfg_checkpointer.get("checkpoint_dir")
        raise UserError(
            f"The files of `{name}` in {folder} cannot be read, fetch them again: {one_line(error)}"
        ) from error


def check_weights(decoder: TransformerDecoder, weights: Mapping[str, Tensor], name: str) -> None:
    """Compare a checkpoint with the model that is to hold it, adapters left out.

    Raises:
        UserError: naming the first weight that is missing, unknown, or of another shape.
    """
    adapters = get_adapter_params(decoder)
    expected = {key: p.shape for key, p in decoder.named_parameters() if key not in adapters}
    model = "teacher_model" if name == "teacher_checkpointer" else "model"
    for key, shape in expected.items():
        if key not in weights:
            raise UserError(
                f"The checkpoint under `{name}` has no weight `{key}`, which `{model}` needs: "
                "check checkpoint_files and model_type, or name the builder that fits."
            )
        if weights[key].shape != shape:
            raise UserError(
                f"The weight `{key}` is {tuple(weights[key].shape)} in the checkpoint under `{name}`, but "
                f"{tuple(shape)} in `{model}`: name the builder or the checkpoint that fits."
            )
    for key in weights:
        if key not in expected:
            raise UserError(
                f"The checkpoint under `{name}` holds `{key}`, which `{model}` has not: "
                "name the builder (number of layers, tied or untied head) or the checkpoint that fits."
            )


def without_checkpoint_wrapper(name: str) -> str:
    """A parameter's name as it is without activation checkpointing, which is its name in state dicts."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _build_decoder(cfg: DictConfig, name: str, settings: Settings, world: World) -> TransformerDecoder:
    device = torch.device("meta") if world.sharded else world.device
    with training.set_default_dtype(settings.torch_dtype), device:
        return build(cfg, name)


def _initial_adapters(
    decoder: TransformerDecoder, weights: Mapping[str, Tensor], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """LoRA's start, A Kaiming-uniform and B zero (Hu et al. 2021), drawn alike for every number of processes.

    DoRA's magnitude starts as the norm of each row of the base weight (Liu et al. 2024), quantised where it will be.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in decoder.named_modules():
        if isinstance(module, (LoRALinear, DoRALinear)):
            name = without_checkpoint_wrapper(name)
            a = torch.empty(module.lora_a.weight.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            state[f"{name}.lora_a.weight"] = a.to(dtype)
            state[f"{name}.lora_b.weight"] = torch.zeros(module.lora_b.weight.shape, dtype=dtype)
            if isinstance(module, DoRALinear):
                base = weights[f"{name}.weight"].to(dtype)
                if isinstance(module.weight, NF4Tensor):
                    base = to_nf4(base).to(dtype)
                state[f"{name}.magnitude"] = torch.linalg.norm(base, dim=1)
    return state


def _shard(root: Teacher | Student, settings: Settings, extra_layers: list[str] | None) -> None:
    """FSDP2 on every transformer layer, on ``extra_layers`` by name, and on ``root`` for the rest."""
    options: dict[str, Any] = {"reshard_after_forward": settings.fsdp_reshard_after_forward}
    if settings.fsdp_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    condition = functools.partial(training.get_shard_conditions, names_to_match=extra_layers)
    for name, module in reversed(list(root.decoder.named_modules())):
        if condition(name, module):
            fully_shard(module, **options)
    options["reshard_after_forward"] = False  # embedding, norm and head: once per step
    fully_shard(root, **options)


def _load_sharded(decoder: TransformerDecoder, weights: Mapping[str, Tensor], settings: Settings, world: World) -> None:
    training.load_from_full_model_state_dict(
        decoder, dict(weights), world.device, strict=True, cpu_offload=settings.fsdp_cpu_offload
    )
    with training.set_default_dtype(settings.torch_dtype), world.device:
        for module in decoder.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    training.validate_no_params_on_meta_device(decoder)
