"""Random weights of the true shapes, for runs whose config has no files: benchmarks and tests of whether a run fits.

A model is random where its checkpointer is ``null`` and ``random_weights: True`` says that this is meant.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchtune.modules.peft import get_adapter_params

from torchtune_kd.models.adapters import without_checkpoint_wrapper

STANDARD_DEVIATION = 0.02  # that of Llama's and Qwen's own initialisation
# Normal values are drawn once and read round and round: 8 billion draws would take a minute, copies take seconds. The
# length is prime, so no two rows of a matrix are equal.
_BLOCK = 1_000_003


class RandomWeights(Mapping[str, Tensor]):
    """Make what a checkpoint of ``decoder`` would hold (no adapters), on demand: nothing is kept but one block.

    Matrices are normal with standard deviation 0.02, biases 0, scales 1. Values depend on ``seed``, the model's
    ``section`` and the parameter's name alone, not on device, number of processes, or the order of reading.

    Args:
        decoder (nn.Module): the model, on any device, ``meta`` included; names and shapes are read off it.
        section (str): ``model`` or ``teacher_model``, so that the two differ.
        dtype (torch.dtype): of the tensors.
        seed (int): of the values. A run gives the config's ``seed``, and 0 where that is null: what it draws then for
            its order and dropout leaves these weights alone, so that any two such runs have the same models.
    """

    def __init__(self, decoder: nn.Module, section: str, dtype: torch.dtype, seed: int) -> None:
        adapters = get_adapter_params(decoder)
        names = {without_checkpoint_wrapper(name): p for name, p in decoder.named_parameters()}
        self._shapes = {name: p.shape for name, p in names.items() if name not in adapters}
        self._key = f"{seed}/{section}"
        self._dtype = dtype
        generator = torch.Generator().manual_seed(_number(self._key))
        self._block = torch.empty(_BLOCK).normal_(std=STANDARD_DEVIATION, generator=generator).to(dtype)

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        """Make the tensor in host memory."""
        return self.write(name, torch.empty(self._shapes[name], dtype=self._dtype))

    @torch.no_grad()
    def write(self, name: str, out: Tensor) -> Tensor:
        """Fill ``out``, a whole and contiguous tensor on any device, with the values of ``name``; returns it."""
        if out.dim() < 2:
            return out.zero_() if name.endswith("bias") else out.fill_(1.0)
        block = self._block = self._block.to(out.device)
        start = _number(f"{self._key}/{name}") % _BLOCK
        flat = out.view(-1)
        flat[: _BLOCK - start].copy_(block[start : start + flat.numel()])
        rest = flat[_BLOCK - start :]
        whole = math.floor(rest.numel() / _BLOCK) * _BLOCK
        rest[:whole].view(-1, _BLOCK).copy_(block)
        rest[whole:].copy_(block[: rest.numel() - whole])
        return out

    def write_all(self, decoder: nn.Module) -> None:
        """Fill every parameter of ``decoder``, which is not sharded, in place; NF4 weights are quantised."""
        for name, parameter in decoder.named_parameters():
            name = without_checkpoint_wrapper(name)
            if name not in self._shapes:
                continue
            if type(parameter.data) is Tensor:
                self.write(name, parameter.data)
            else:
                with torch.no_grad():
                    parameter.copy_(self[name].to(parameter.device))


class NoInitialValues(TorchFunctionMode):
    """Build modules without drawing values that are overwritten anyway: of 8 billion weights that is a minute."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def _number(text: str) -> int:
    """Hash a text to 63 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
