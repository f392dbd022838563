"""The adapters of a LoRA, DoRA, QLoRA or QDoRA student: what they compute, and their values before the first step."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, linear_nf4, to_nf4
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear


def without_checkpoint_wrapper(name: str) -> str:
    """Return a parameter's name without activation checkpointing, which is its name in state dicts."""
    return name.replace("_checkpoint_wrapped_module.", "")


class BiasedDoRALinear(DoRALinear):
    """Compute m / ||W + sBA|| · (W + sBA) x + b, as DoRA's paper, its merged weights and PEFT do.

    torchtune scales b too. No merged weight and no PEFT adapter can express that with the base model's bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return super().forward(x)
        base_out = linear_nf4(input=x, weight=self.weight) if self._quantize_base else F.linear(x, self.weight)
        x = self.dropout(x)
        lora_out = self.lora_b(self.lora_a(x))
        # B A by the modules' own calls, as in torchtune: FSDP gathers their weights there
        identity = torch.eye(self.in_dim, device=x.device, dtype=x.dtype)
        lora_weight = self.lora_b(self.lora_a(identity)).T
        norm = self._get_weight_norm(self.weight.to(x.dtype), lora_weight.detach()).detach()
        scale = (self.magnitude / norm).view(1, -1)
        return scale * (base_out + self.scaling * lora_out) + self.bias


@contextlib.contextmanager
def adapters_off(decoder: nn.Module) -> Iterator[None]:
    """Let a decoder compute what its base weights do; torchtune's ``disable_adapter`` switches all of them on after."""
    layers = [module for module in decoder.modules() if isinstance(module, LoRALinear | DoRALinear)]
    before = [layer.disabled for layer in layers]
    for layer in layers:
        layer.disabled = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled


def leave_biases_unscaled(decoder: nn.Module) -> None:
    """Let DoRA layers that have a bias compute as :class:`BiasedDoRALinear` does, in place; Qwen 2 has them."""
    for module in decoder.modules():
        if type(module) is DoRALinear and module.use_bias:
            module.__class__ = BiasedDoRALinear


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
