"""A teacher that runs beside the student.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.modules import TransformerDecoder

from torchtune_kd.config.reading import Config
from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.sharding import reshard, shard
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import loading, phase, say
from torchtune_kd.losses.signals import Head, Hidden
from torchtune_kd.models.build import build_decoder
from torchtune_kd.models.float8_head import described, loader, replace_head
from torchtune_kd.models.loading import check_weights, load, load_weights
from torchtune_kd.models.output_head import output_head, skip_output_head
from torchtune_kd.models.quantised_body import Int8Weights, quantise_body
from torchtune_kd.models.random_weights import RandomWeights
from torchtune_kd.teachers.base import NoTeacher, Teacher, Unchanging


class LiveTeacher(Unchanging, nn.Module):
    """A frozen decoder that gives its last hidden states and the head that reads them.

    Under FSDP2 this module is the root. Its own parameters (embedding, norm, head) are gathered by the first
    forward of a step and stay so until :meth:`end_step`: the head travels once per step.

    Args:
        decoder (TransformerDecoder): changed in place.
        head (Head | None): reads the states in place of the decoder's own, whole on every process.

    Attributes:
        head (Head | None): the same.
    """

    def __init__(self, decoder: TransformerDecoder, head: Head | None = None) -> None:
        super().__init__()
        self.decoder = skip_output_head(decoder).eval()
        self.requires_grad_(False)
        self.head = head

    @torch.no_grad()
    def forward(self, tokens: Tensor, **attention: Any) -> Tensor:
        return self.decoder(tokens, **attention)

    def signal(self, batch: Batch) -> Hidden:
        """Return the last hidden states [B, S, D] and the head, which is whole until :meth:`end_step`."""
        with phase("teacher"):
            states = self(batch.tokens, **batch.attention)
            if self.head is not None:
                return Hidden((states,), (self.head,))
            weight, bias = output_head(self.decoder)
        return Hidden((states,), (Head(weight.detach(), None if bias is None else bias.detach()),))

    def end_step(self, student: nn.Module) -> None:
        """Give the gathered parameters back."""
        reshard(self)


def build_teacher(config: Config, world: World) -> Teacher:
    """Build the teacher with its weights, frozen, in the run's dtype."""
    settings = config.settings
    if not settings.uses_teacher:
        return NoTeacher()
    with loading("teacher", world.device):
        _, weights = load_weights(config.teacher_checkpointer, world)
        kind = config.teacher_weights
        decoder = build_decoder(config.teacher_model, settings, world, quantised_later=kind is not None)
        if weights is None:
            weights = RandomWeights(decoder, "teacher_model", settings.torch_dtype, settings.seed or 0)
        check_weights(decoder, weights, "teacher_checkpointer")
        if kind is not None:
            quantise_body(decoder, kind, world.num_shards)
            weights = Int8Weights(weights, decoder)
        head = None
        if config.teacher_head is not None:
            head = replace_head(decoder, loader(weights, settings, world))
            if world.is_rank_zero:
                say(described(head, decoder, settings))
        teacher = LiveTeacher(decoder, head)
        if settings.compile:
            training.compile_model(decoder, verbose=world.is_rank_zero)
        if world.sharded:
            shard(teacher, settings, world)
        load(decoder, weights, {}, settings, world)
    return teacher
