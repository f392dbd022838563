"""Which weights NF4 can hold, checked before anything is built or quantised."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import DoRALinear, LoRALinear

# torchao's to_nf4 quantises blocks of 64 values and then the scales of 256 blocks together
NF4_MULTIPLE = 64 * 256


def check_nf4_shapes(weights: nn.Module | Iterable[tuple[str, Sequence[int]]], world_size: int = 1) -> None:
    """Raise one clear error if a weight cannot be held in NF4.

    A weight of shape [out, in] needs ``out * in`` to be a multiple of 16384 (64 values a block, 256 blocks a
    scale). Sharded over R ranks along its first dimension, every shard has to obey the rule: ``out`` is a
    multiple of R and ``out * in`` of 16384 R.

    Args:
        weights (nn.Module | Iterable[tuple[str, Sequence[int]]]): Pairs of a name and a shape; or a model, of
            which the NF4 weights are checked if it has any, and otherwise those that QLoRA would quantise:
            the linear layers, without the output.
        world_size (int): Number of ranks R that the weights are sharded over. Default 1.

    Raises:
        ValueError: If a weight breaks the rule; names the first and its shape.
    """
    pairs = _quantised_weights(weights) if isinstance(weights, nn.Module) else weights
    bad = next(((name, shape) for name, shape in pairs if not _fits(shape, world_size)), None)
    if bad is None:
        return
    name, shape = bad
    if world_size > 1 and _fits(shape, 1):
        rule = f"so that each of {world_size} ranks holds whole rows with a multiple of {NF4_MULTIPLE} elements"
        advice = "use fewer ranks, or a LoRA model without quantize_base"
    else:
        rule = f"with a multiple of {NF4_MULTIPLE} elements"
        advice = "use a LoRA model without quantize_base"
    raise ValueError(
        f"Expected NF4 weights {rule}, but {name} of shape {list(shape)} has {math.prod(shape)}; {advice}."
    )


def check_nf4_build(build: Callable[..., nn.Module], world_size: int = 1) -> None:
    """Raise one clear error if a QLoRA builder would make a weight that NF4 cannot hold.

    Builds on the meta device, so it costs no memory, and any torchtune builder will do.

    Args:
        build (Callable[..., nn.Module]): Builder that needs no further argument and takes the keyword
            ``quantize_base``, for example ``partial(config.instantiate, cfg.model)``.
        world_size (int): Number of ranks the weights are sharded over. Default 1.

    Raises:
        ValueError: If a weight breaks the rule of :func:`check_nf4_shapes`.
    """
    with torch.device("meta"):
        try:
            model = build()
        except AssertionError:  # torchao's own check, which names no layer
            check_nf4_shapes(build(quantize_base=False), world_size)
            raise
    check_nf4_shapes(model, world_size)


def _fits(shape: Sequence[int], world_size: int) -> bool:
    return shape[0] % world_size == 0 and math.prod(shape) % (NF4_MULTIPLE * world_size) == 0


def _quantised_weights(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    quantised = [(name, weight.shape) for name, weight in model.named_parameters() if isinstance(weight, NF4Tensor)]
    if quantised:
        yield from quantised
        return
    # adapted layers first: torchtune quantises them in every family, the others in most
    for kinds in ((LoRALinear, DoRALinear), (nn.Linear,)):
        for name, module in model.named_modules():
            if isinstance(module, kinds) and name.split(".")[-1] not in ("lora_a", "lora_b", "output"):
                yield f"{name}.weight", module.weight.shape
