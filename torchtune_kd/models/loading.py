"""Weights from files into models: one process per node reads, each keeps its shard, tensor by tensor.

The reader's files are memory-mapped, so host memory holds a checkpoint once per node and only as cached file pages,
which the kernel may drop. Any other process holds one whole tensor at a time, on its device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params

from torchtune_kd.config.sections import Section
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.sharding import gather_tensor, shard_tensor
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, one_line
from torchtune_kd.models.random_weights import RandomWeights


def load_weights(section: Section | None, world: World | None = None) -> tuple[Any, dict[str, Tensor] | None]:
    """Build a checkpointer, and read its model weights by torchtune's parameter names.

    Without a section, which ``read_config`` lets through with ``random_weights: True`` alone, there are neither:
    None and None.

    Args:
        section (Section | None): ``checkpointer`` or ``teacher_checkpointer``.
        world (World | None): with it one process of each node reads, and the others get meta tensors, which have
            shape and dtype alone; without it this process reads.

    Raises:
        UserError: on every process, if the files cannot be read on one.
    """
    if section is None:
        return None, None
    checkpointer = section.build()
    if world is None or not world.sharded:
        return checkpointer, _read(checkpointer, section)
    weights, error = {}, None
    if world.reads_files:
        try:
            weights = _read(checkpointer, section)
        except UserError as unreadable:
            error = str(unreadable)
    layout = {key: (weight.shape, weight.dtype) for key, weight in weights.items()} if world.is_rank_zero else {}
    error, layout = world.first(error), world.gather(layout)[0]
    if error is not None:
        raise UserError(error)
    if not world.reads_files:
        weights = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in layout.items()}
    return checkpointer, weights


def check_weights(decoder: TransformerDecoder, weights: Mapping[str, Tensor], name: str) -> None:
    """Compare a checkpoint with the model that is to hold it, adapters left out.

    Raises:
        UserError: naming the first weight that is missing, unknown, or of another shape.
    """
    if isinstance(weights, RandomWeights):  # made for this model
        return
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


def load(
    decoder: TransformerDecoder,
    weights: Mapping[str, Tensor],
    adapter_weights: Mapping[str, Tensor],
    settings: Settings,
    world: World,
) -> None:
    """Give a decoder its weights: one on the meta device, as a sharded one is, tensor by tensor.

    Names and shapes were compared before. Only the values that a node's reader holds in ``weights`` and
    ``adapter_weights`` count.
    """
    if not world.sharded and not any(parameter.is_meta for parameter in decoder.parameters()):
        if isinstance(weights, RandomWeights):
            weights.write_all(decoder)
            weights = {}
        decoder.load_state_dict({**weights, **adapter_weights}, strict=False)
        return
    state = {}
    for name, target in decoder.state_dict().items():
        whole = torch.empty(target.shape, dtype=target.dtype, device="meta")
        if world.reads_files:
            source = adapter_weights if name in adapter_weights else weights
            whole = source[name].to(target.dtype)
        part = shard_tensor(world.share_in_node(whole), target)
        part = part.cpu() if settings.fsdp_cpu_offload else part
        state[name] = nn.Parameter(part, requires_grad=part.is_floating_point())
    decoder.load_state_dict(state, assign=True)  # there is nothing to copy into on the meta device
    with training.set_default_dtype(settings.torch_dtype), world.device:
        for module in decoder.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    training.validate_no_params_on_meta_device(decoder)


def gather_weights(decoder: nn.Module, world: World) -> dict[str, Tensor]:
    """Gather the weights of a sharded decoder, dequantised, in host memory of rank 0; return none elsewhere."""
    state = {}
    for name, parameter in decoder.state_dict().items():
        whole = gather_tensor(parameter, world.device)
        if world.is_rank_zero:
            state[name] = whole.detach().to("cpu", copy=True)  # of one process, full_tensor() is the shard itself
    return state


def _read(checkpointer: Any, section: Section) -> dict[str, Tensor]:
    try:
        return checkpointer.load_checkpoint()[training.MODEL_KEY]
    except Exception as error:  # torchtune's checkpointers raise whatever their formats' readers do
        folder = section.get("checkpoint_dir")
        raise UserError(
            f"The files of `{section.path}` in {folder} cannot be read, fetch them again or name the checkpointer that "
            f"fits: {one_line(error)}"
        ) from error
