"""A teacher's head in 8-bit floats: half the bytes, and on a GPU that multiplies them nearly half the time.

Rows are divided by scales of their own, so that the largest element of each is 448, the largest number of e4m3:

    logits[n, v] = (h8 @ w8.T)[n, v] · scale_h[n] · scale_w[v] (+ bias[v])    with  x8 = e4m3(x / scale),
                                                                                  scale = max|x| / 448

Legend: N tokens, C tokens of a chunk, V vocabulary, V' = V rounded up to a multiple of 64, D hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._meta import account_product, stands_for
from ._plan import rows_per_block, slices

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of rows of zeros, which stay zeros

# Ids that the rows of a chunk of logits are apart, a multiple of 128 bytes of bf16. Rows of an odd length would start
# anywhere, and Triton then loads 16 bits at a time and cuBLAS leaves its aligned path.
ROW_MULTIPLE = 64
WIDTH_MULTIPLE = 16  # of D: the products of 8-bit floats take no other on a GPU, so that no device does


class Float8Weight(NamedTuple):
    """Hold a head in 8-bit floats: row v of the head is about ``data[v] * scale[v]``.

    :func:`float8_weight` makes it.

    Attributes:
        data (Tensor): ``[V', D]`` float8_e4m3fn, contiguous; rows from V on are zeros.
        scale (Tensor): ``[V]`` fp32, above 0.
    """

    data: Tensor
    scale: Tensor


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x / scale`` ``[N, D]`` in float8_e4m3fn, and the scale of each row ``[N, 1]`` in fp32.

    A row with an infinite element, or NaN, becomes NaN.
    """
    # times 1/448: by a number the GPU would divide so, and the CPU would not
    scale = (x.abs().amax(-1, keepdim=True).float() * (1.0 / _LARGEST)).clamp(min=_SMALLEST_SCALE)
    return (x.float() / scale).to(FLOAT8), scale


def quantised_weight(weight: Tensor) -> Float8Weight:
    """Quantise a head ``[V, D]`` a few rows at a time, so that no copy of it in fp32 is held."""
    (vocab, width), device = weight.shape, weight.device
    data = torch.empty(padded(vocab), width, dtype=FLOAT8, device=device)
    scale = torch.empty(vocab, dtype=torch.float32, device=device)
    for rows in slices(vocab, rows_per_block(width, device)):
        data[rows], scales = quantised_rows(weight[rows])
        scale[rows] = scales.squeeze(-1)
    data[vocab:].view(torch.uint8).zero_()
    return Float8Weight(data, scale)


def padded(vocab: int) -> int:
    """Return V'."""
    return -(-vocab // ROW_MULTIPLE) * ROW_MULTIPLE


def has_float8_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `device` multiplies 8-bit floats with a scale for each row into logits of `dtype`.

    That is NVIDIA's from compute capability 8.9 on, into bf16. PyTorch had it for 9.x first.
    """
    if dtype != torch.bfloat16 or stands_for(device).type != "cuda":
        return False
    if device.type == "meta":
        return True
    if torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability[0] == 9 or (capability >= (8, 9) and torch.__version__ >= "2.8")


class Float8Product:
    """Compute a teacher's logits from its head in 8-bit floats.

    A device with a product of them (:func:`has_float8_product`) does it in one. Anywhere else it is emulated: the same
    numbers are multiplied in fp32, a few rows of the head at a time, which is exact but for the order of the sum.
    Either way the result is rounded once.

    Args:
        weight (Tensor): ``data`` of a :class:`Float8Weight`.
        scale (Tensor): its ``scale``.
        bias (Tensor | None): ``[V]`` in the logits' dtype.
        vocab (int): ids to compute, at most V.
        dtype (torch.dtype): of the logits.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, vocab: int, dtype: torch.dtype) -> None:
        width = padded(vocab)
        self._vocab, self._in_one = vocab, has_float8_product(weight.device, dtype)
        self._weight, self._scale, self._bias = weight[:vocab], scale[:vocab], None if bias is None else bias[:vocab]
        if self._in_one:
            # its numbers of columns are multiples of 16; what it computes of the padding is written over
            self._weight, self._scale = weight[:width], _extended(self._scale, width).unsqueeze(0)
            self._bias = None if self._bias is None else _extended(self._bias, width)

    def __call__(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits of ``hidden`` ``[C, D]`` into the first `vocab` columns of ``out`` ``[C, V']``.

        Columns after them hold anything then.
        """
        rows, scale = quantised_rows(hidden)
        if not self._in_one:
            self._emulate(rows.float(), scale, out)
        elif out.is_meta:
            account_product(2 * rows.shape[0] * self._weight.numel(), rows.nbytes + self._weight.nbytes + out.nbytes)
        else:
            torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]: torch has no public name for it in 2.6
                rows,
                self._weight.t(),
                scale_a=scale,
                scale_b=self._scale,
                bias=self._bias,
                out_dtype=out.dtype,
                use_fast_accum=False,  # else Hopper's tensor cores keep some 14 bits of the whole sum
                out=out,
            )

    def _emulate(self, rows: Tensor, scale: Tensor, out: Tensor) -> None:
        for ids in slices(self._vocab, rows_per_block(max(rows.shape), rows.device)):
            logits = (rows @ self._weight[ids].float().t()).mul_(self._scale[ids]).mul_(scale)
            if self._bias is not None:
                logits += self._bias[ids]
            out[:, ids] = logits


def _extended(row: Tensor, width: int) -> Tensor:
    """Return a vector with zeros after it, `width` long."""
    return row if len(row) == width else torch.cat([row, row.new_zeros(width - len(row))])
