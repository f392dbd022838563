"""Build teacher and student, load their weights, and shard them where the run has several processes.

One path for full-weight, LoRA, DoRA and QLoRA students: what the student is follows from its builder.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torchtune.modules.common_utils as common_utils
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import modules, training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_kd.kernels import linear_kd_loss
from torchtune_kd.losses import KDLoss
from torchtune_kd.models.output_head import output_head, skip_output_head
from torchtune_kd.training.adapters import initial_adapters, leave_biases_unscaled
from torchtune_kd.training.loading import check_weights, load_sharded, load_weights, load_whole
from torchtune_kd.training.phases import loading
from torchtune_kd.training.random_weights import NoInitialValues, RandomWeights
from torchtune_kd.training.settings import Settings, build
from torchtune_kd.training.sharding import reshard, shard
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
    with loading("teacher", world.device):
        _, weights = load_weights(cfg.get("teacher_checkpointer"), "teacher_checkpointer", world)
        decoder = _build_decoder(cfg, "teacher_model", settings, world)
        if weights is None:
            weights = RandomWeights(decoder, "teacher_model", settings.torch_dtype, settings.seed or 0)
        check_weights(decoder, weights, "teacher_checkpointer")
        teacher = Teacher(decoder)
        if settings.compile:
            training.compile_model(decoder, verbose=world.is_rank_zero)
        if world.sharded:
            shard(teacher, settings, world)
            load_sharded(decoder, weights, {}, settings, world)
        else:
            load_whole(decoder, weights, {})
    return teacher


def build_student(
    cfg: DictConfig,
    settings: Settings,
    world: World,
    kd_loss: KDLoss,
    weights: Mapping[str, Tensor] | None,
    seed: int,
) -> Student:
    """The student with ``weights`` (None: random ones), in the run's dtype.

    Its adapters are trainable if it has any, else all of it.
    """
    common_utils._use_low_cpu_ram = settings.low_cpu_ram
    with loading("student", world.device):
        decoder = _build_decoder(cfg, "model", settings, world)
        if weights is None:
            weights = RandomWeights(decoder, "model", settings.torch_dtype, settings.seed or 0)
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
            student.keeps_layers_gathered = not settings.fsdp_reshard_after_forward
            load_sharded(decoder, weights, adapter_weights, settings, world)
        else:
            load_whole(decoder, weights, adapter_weights)
    student.offload_activations = training.get_act_offloading_ctx_manager(
        decoder, settings.enable_activation_offloading
    )
    return student


def _build_decoder(cfg: DictConfig, name: str, settings: Settings, world: World) -> TransformerDecoder:
    device = torch.device("meta") if world.sharded else world.device
    with training.set_default_dtype(settings.torch_dtype), device, NoInitialValues():
        return build(cfg, name)
