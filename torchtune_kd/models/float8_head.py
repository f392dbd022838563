"""A teacher's head in 8-bit floats, in place of the decoder's own.

Shapes: V vocabulary, D hidden width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, one_line
from torchtune_kd.kernels import float8_weight, has_float8_product
from torchtune_kd.losses.signals import Head
from torchtune_kd.models.output_head import output_head

MIB = 2**20


def replace_head(decoder: TransformerDecoder, load: Callable[[str], Tensor]) -> Head:
    """Quantise the head of a decoder that skips it (``skip_output_head``), and free its own weight.

    An embedding that is tied to the head stays. To be called before FSDP2 shards the decoder, which then knows nothing
    of the head: each process holds all of it, in 8 bits, and it is gathered in no step.

    Args:
        decoder (TransformerDecoder): whose parameters may be on the meta device; loses its ``output``.
        load (Callable[[str], Tensor]): returns the values of a parameter, whole and on the device, by its name.

    Raises:
        UserError: if the head cannot be quantised.
    """
    weight, bias = output_head(decoder)
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    check_head(decoder)
    head = Head(float8_weight(load(names[id(weight)])), None if bias is None else load(names[id(bias)]))
    if isinstance(decoder.output, nn.Module):  # torchtune's TiedLinear is none
        decoder.output = nn.Identity()
    return head


def check_head(decoder: TransformerDecoder) -> None:
    """Refuse a teacher whose head cannot be quantised; nothing is computed.

    Raises:
        UserError: in one sentence.
    """
    weight = output_head(decoder)[0]
    try:
        float8_weight(torch.empty_like(weight, device="meta", requires_grad=False))
    except ValueError as error:
        raise UserError(f"`teacher_head: float8` does not fit `teacher_model`: {one_line(error)}") from error


def loader(weights: Mapping[str, Tensor], settings: Settings, world: World) -> Callable[[str], Tensor]:
    """Return a function that gives every process a whole tensor of a checkpoint, in the run's dtype on its device.

    Only the values that a node's reader holds in ``weights`` count.
    """

    def load(name: str) -> Tensor:
        if world.reads_files:
            return world.share_in_node(weights[name].to(settings.torch_dtype))
        return world.share_in_node(torch.empty(weights[name].shape, dtype=settings.torch_dtype, device="meta"))

    return load


def described(head: Head, decoder: TransformerDecoder, settings: Settings) -> str:
    """Say in a sentence what the head of ``decoder`` is, and how its logits are computed."""
    data, scale = head.weight
    text = f"The teacher's head is in 8-bit floats, {(data.nbytes + scale.nbytes) / MIB:.1f} MiB"
    if isinstance(decoder.output, nn.Identity):
        text += f" instead of {data.numel() * settings.torch_dtype.itemsize / MIB:.1f}"
    else:
        text += " beside the embedding, which it is tied to"
    if has_float8_product(data.device, settings.torch_dtype):
        return f"{text}."
    return f"{text}; {data.device.type} has no product of them in {settings.dtype}, so it is emulated, which is slower."
