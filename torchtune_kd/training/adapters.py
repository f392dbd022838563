"""The adapters of a LoRA, DoRA, QLoRA or QDoRA student before its first step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear


def without_checkpoint_wrapper(name: str) -> str:
    """A parameter's name as it is without activation checkpointing, which is its name in state dicts."""
    return name.replace("_checkpoint_wrapped_module.", "")


def initial_adapters(
    decoder: TransformerDecoder, weights: Mapping[str, Tensor], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """LoRA's start, A Kaiming-uniform and B zero (Hu et al. 2021), drawn alike for every number of processes.

    DoRA's magnitude starts as the norm of each row of the base weight (Liu et al. 2024), quantised where it will be.

    Args:
        decoder (TransformerDecoder): the student, on any device, ``meta`` included.
        weights (Mapping[str, Tensor]): its base weights, by parameter name.
        dtype (torch.dtype): of the adapters.
        seed (int): of what is drawn.
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
