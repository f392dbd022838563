"""A teacher whose layers are held in 4 or 8 bits: for what does not fit.

The linear layers of all transformer blocks are quantised as their weights are loaded, tensor by tensor; embedding,
norms and head stay as they are. ``nf4`` is QLoRA's (Dettmers et al., 2023). ``int8`` divides each row by a scale of
its own, s = max |w| / 127, and is dequantised in each call: half the memory of bf16, and not faster.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.low_precision import FrozenNF4Linear

from torchtune_kd.errors import UserError, one_line
from torchtune_kd.models.nf4 import check_nf4_shapes

KINDS = ("nf4", "int8")


class Int8Linear(nn.Module):
    """A frozen linear layer y = x (s w)^T + b with 8-bit weights.

    FSDP2 holds no integer parameters (PyTorch 2.6 to 2.11 at least), and gathers one dtype alone (2.6 and 2.7). So
    the bytes of w and s are held as numbers of ``dtype``, which mean nothing as such, and seen as what they are in
    each call.

    Args:
        in_dim (int): of x.
        out_dim (int): of y.
        bias (bool): whether there is b.
        dtype (torch.dtype): of b and of the products; a row of w has to be whole numbers of it.
    """

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale = torch.empty(out_dim, in_dim, dtype=torch.int8), torch.empty(out_dim, 1, dtype=torch.float32)
        self.weight = nn.Parameter(weight.view(dtype), requires_grad=False)
        self.scale = nn.Parameter(scale.view(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_dim, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [..., out_dim] of x [..., in_dim], in x's dtype."""
        weight, scale = self.quantised()
        return F.linear(x, (weight * scale).to(x.dtype), self.bias)

    def quantised(self) -> tuple[Tensor, Tensor]:
        """Return w [out, in] int8 and s [out, 1] fp32."""
        return self.weight.view(torch.int8), self.scale.view(torch.float32)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [out, in] as int8 and its scales [out, 1] fp32; a row of zeros has the scale 1."""
    largest = weight.float().abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (weight.float() / scale).round().to(torch.int8), scale


def quantise_body(decoder: TransformerDecoder, kind: str, shards: int) -> None:
    """Replace the linear layers of a decoder's blocks, in place; it is on the meta device, and its weights come later.

    Args:
        decoder (TransformerDecoder): without adapters.
        kind (str): "nf4" or "int8".
        shards (int): processes that share the weights.

    Raises:
        UserError: for a weight that NF4 cannot hold, or one of which int8 cannot hold a row.
    """
    found = list(_linears(decoder))
    uneven = [(name, linear) for name, linear in found if linear.in_features % linear.weight.dtype.itemsize]
    if kind == "int8" and uneven:
        name, linear = uneven[0]
        raise UserError(
            "A teacher in int8 (`teacher_weights`, or `weights` of one of `teachers`) needs rows of a multiple of "
            f"{linear.weight.dtype.itemsize} weights, but its {name}.weight is {list(linear.weight.shape)}: delete "
            "that key."
        )
    if kind == "nf4":
        try:
            check_nf4_shapes([(f"{name}.weight", linear.weight.shape) for name, linear in found], shards)
        except ValueError as error:
            fits = "" if uneven else ", int8 does"
            raise UserError(f"`teacher_weights: nf4` does not fit the teacher{fits}: {one_line(error)}") from error
    with torch.device("meta"):
        for name, linear in found:
            has_bias, dtype = linear.bias is not None, linear.weight.dtype
            sizes = linear.in_features, linear.out_features
            if kind == "nf4":
                quantised = FrozenNF4Linear(*sizes, bias=has_bias, dtype=dtype)
            else:
                quantised = Int8Linear(*sizes, bias=has_bias, dtype=dtype)
            decoder.set_submodule(name, quantised)


def _linears(decoder: TransformerDecoder) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in decoder.layers.named_modules():
        if type(module) is nn.Linear:
            yield f"layers.{name}", module


class Int8Weights(Mapping[str, Tensor]):
    """A checkpoint's weights by name, those of 8-bit layers quantised when they are asked for.

    Args:
        weights (Mapping[str, Tensor]): of the checkpoint; meta tensors give meta tensors.
        decoder (nn.Module): with :class:`Int8Linear` layers.
    """

    def __init__(self, weights: Mapping[str, Tensor], decoder: nn.Module) -> None:
        self._weights = weights
        layers = {name: module for name, module in decoder.named_modules() if isinstance(module, Int8Linear)}
        self._of = {
            f"{name}.{part}": (f"{name}.weight", at, layer.weight.dtype)
            for name, layer in layers.items()
            for at, part in enumerate(_PARTS)
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._of:
            return self._weights[name]
        source, part, held_as = self._of[name]
        return quantise_rows(self._weights[source])[part].view(held_as)

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._weights), **dict.fromkeys(self._of)})

    def __len__(self) -> int:
        return len(list(iter(self)))


_PARTS = ("weight", "scale")
