"""DistillKit's codings of a token's log-probabilities, back to numbers.

``compressed_logprobs`` holds, of the k largest log-probabilities ℓ_0 ≥ ℓ_1 ≥ ..., one after the other:

    exact_k of them as they are (exact_dtype)
    c [t], coefficients of the terms f (term_dtype): ℓ_{exact_k + x} ≈ Σ_t c_t f_t(x),  f = x^i, √x or e^x,
        x = 0, 1, ... (with normalize_t from 0 to 1)
    for each of residual_bins a scale (scale_dtype), and num_elements residuals of element_bits bits over that scale

With delta_encoding these are ℓ_0, ℓ_1 - ℓ_0, ℓ_2 - ℓ_1, ... instead. ``bytepacked_indices`` are k ids of ⌈log2 d⌉ bits.
Bits are packed from the highest to the lowest, and begin at a byte.

The legacy coding has exact_values and coeffs in columns of their own, of the terms x^-i (x^i without
invert_polynomial) for x = 1, 2, ... and √x; ``packed_indices`` are words of 64 bits with as many whole ids as fit into
each, the first in the lowest bits.

Shapes: m tokens, k ids of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from torchtune_kd.errors import UserError, first_line

_DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
_AT_ONCE = 4096  # tokens whose bits are unpacked, 8 bytes an id
_COMPRESSED, _LEGACY = "logprob_compressor", "legacy_logit_compression"


@dataclass(frozen=True)
class Compressed:
    """The keys of ``compression_config.yaml``."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: list[Any] | None = None
    term_dtype: str = "float32"
    residual_bins: list[Mapping[str, Any]] = field(default_factory=list)
    delta_encoding: bool = True
    error_diffusion: bool = False  # changes what is written, not how it is read
    normalize_t: bool = False

    columns = ("compressed_logprobs", "bytepacked_indices")

    @property
    def rounding(self) -> float:
        """Return the largest relative error of exact values, also of the sums of differences, which have one sign."""
        return torch.finfo(_DTYPES[self.exact_dtype]).eps / 2

    def decode(self, log_probs: np.ndarray, ids: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [m, k] int64 and log-probabilities [m, k] fp32 of two columns of bytes [m, ...] uint8."""
        bits = (self.d - 1).bit_length()
        _check_width("bytepacked_indices", ids, (self.k * bits + 7) // 8, where)
        _check_width("compressed_logprobs", log_probs, self._bytes(), where)
        begin = self.exact_k * _itemsize(self.exact_dtype)
        exact = _floats(log_probs[:, :begin], self.exact_dtype)
        rest = torch.zeros(len(log_probs), self.k - self.exact_k)
        if self.polynomial_terms:
            end = begin + len(self.polynomial_terms) * _itemsize(self.term_dtype)
            coefficients = _floats(log_probs[:, begin:end], self.term_dtype)
            x = torch.arange(rest.shape[1], dtype=torch.float64)
            if self.normalize_t:
                x /= max(1, rest.shape[1] - 1)
            rest += coefficients @ _terms(self.polynomial_terms, x).to(_DTYPES[self.term_dtype]).float().T
            begin = end
        at = 0
        for each in self.residual_bins:
            end = begin + _itemsize(each["scale_dtype"])
            scale = _floats(log_probs[:, begin:end], each["scale_dtype"])
            number, width = each["num_elements"], each["element_bits"]
            begin, end = end, end + (number * width + 7) // 8
            steps = torch.from_numpy(unpack(log_probs[:, begin:end], width, number))
            steps = 2 * steps - 1 if width == 1 else steps - 2 ** (width - 1)
            rest[:, at : at + number] += steps.float() * scale
            begin, at = end, at + number
        whole = torch.cat([exact, rest], -1)
        if self.delta_encoding:
            whole = whole.cumsum(-1)
        return unpack(ids, bits, self.k), whole.numpy()

    def _bytes(self) -> int:
        bins = sum(
            _itemsize(each["scale_dtype"]) + (each["num_elements"] * each["element_bits"] + 7) // 8
            for each in self.residual_bins
        )
        terms = len(self.polynomial_terms or ()) * _itemsize(self.term_dtype)
        return self.exact_k * _itemsize(self.exact_dtype) + terms + bins


@dataclass(frozen=True)
class Legacy:
    """The keys under ``legacy_logit_compression``."""

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"

    columns = ("packed_indices", "exact_values", "coeffs")
    rounding = 2.0**-11  # of fp16

    def decode(
        self, packed: np.ndarray, exact: np.ndarray, coefficients: np.ndarray, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [m, k] int64 and values [m, k] fp32, log-probabilities or logits, of the three columns."""
        bits = (self.vocab_size - 1).bit_length()
        in_a_word = 64 // bits
        terms = self.polynomial_degree + 1 + self.with_sqrt_term if self.k > self.exact_k else 0
        _check_width("packed_indices", packed, -(-self.k // in_a_word), where)
        _check_width("exact_values", exact, self.exact_k, where)
        _check_width("coeffs", coefficients, terms, where)
        shifts = np.arange(in_a_word, dtype=np.uint64) * np.uint64(bits)
        ids = (packed.astype(np.uint64)[:, :, None] >> shifts) & np.uint64(2**bits - 1)
        values = torch.from_numpy(exact.astype(np.float32))
        if terms:
            x = torch.arange(1, self.k - self.exact_k + 1, dtype=torch.float64)
            powers = [-i if self.invert_polynomial else i for i in range(self.polynomial_degree + 1)]
            matrix = _terms([*powers, "sqrt"] if self.with_sqrt_term else powers, x).float()
            values = torch.cat([values, torch.from_numpy(coefficients.astype(np.float32)) @ matrix.T], -1)
        return ids.reshape(len(packed), -1)[:, : self.k].astype(np.int64), values.numpy()


def read_compression(file: Path) -> Compressed | Legacy:
    """Read ``compression_config.yaml``, or a DistillKit config that has such a section (under ``teacher``).

    Raises:
        UserError: if it cannot be read, or says what is unknown here.
    """
    try:
        config = OmegaConf.load(file)
        plain = OmegaConf.to_container(config) if isinstance(config, DictConfig) else None
    except Exception as error:  # YAML's and OmegaConf's errors, and those of the file
        raise UserError(
            f"Expected DistillKit's compression config, but {file} cannot be read ({first_line(error)}): name it under "
            "--compression."
        ) from error
    section = plain if isinstance(plain, dict) else {}
    section = section.get("teacher") or section
    if section.get(_LEGACY) is not None:
        return _built(Legacy, section[_LEGACY], file)
    return _built(Legacy if "polynomial_degree" in section else Compressed, section.get(_COMPRESSED) or section, file)


def _built(kind: type, section: Mapping[str, Any], file: Path) -> Any:
    known = {each.name: each for each in fields(kind)}
    needed = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    for name in needed:
        if name not in section:
            raise UserError(f"Expected `{name}` in DistillKit's compression config {file}, but there is none: add it.")
    for name in section:
        if name not in known:
            raise UserError(
                f"DistillKit's compression config {file} has the key `{name}`, which this version does not know: "
                "decode the source with the DistillKit that wrote it."
            )
    built = kind(**section)
    bins = getattr(built, "residual_bins", ())
    dtypes = [built.term_dtype, getattr(built, "exact_dtype", "float32"), *(each["scale_dtype"] for each in bins)]
    strange = [dtype for dtype in dtypes if dtype not in _DTYPES]
    strange += [t for t in getattr(built, "polynomial_terms", None) or () if not isinstance(t, int) and t not in _TERMS]
    if strange or not 0 <= built.exact_k <= built.k or built.k < 1:
        what = f"`{strange[0]}`" if strange else f"exact_k {built.exact_k} of k {built.k}"
        raise UserError(
            f"DistillKit's compression config {file} has {what}, which this version does not know: decode the source "
            "with the DistillKit that wrote it."
        )
    return built


_TERMS = {"sqrt": torch.sqrt, "exp": torch.exp}


def _terms(terms: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """Return the terms [x, t] at points."""
    return torch.stack([x**term if isinstance(term, int) else _TERMS[term](x) for term in terms], -1)


def unpack(packed: np.ndarray, bits: int, number: int) -> np.ndarray:
    """Return so many integers [m, number] int64 of ``bits`` bits each from bytes [m, ...]."""
    parts = []
    for begin in range(0, max(len(packed), 1), _AT_ONCE):
        some = packed[begin : begin + _AT_ONCE]
        each = np.unpackbits(some, axis=1)[:, : number * bits].reshape(len(some), number, bits)
        wide = np.pad(each, ((0, 0), (0, 0), (64 - bits, 0)))
        parts.append(np.packbits(wide, axis=-1).view(">i8")[..., 0].astype(np.int64))
    return np.concatenate(parts)


def _floats(raw: np.ndarray, dtype: str) -> torch.Tensor:
    """Return bytes [m, ...] as numbers of a dtype, in fp32."""
    flat = torch.from_numpy(np.ascontiguousarray(raw).reshape(-1))
    return flat.view(_DTYPES[dtype]).view(len(raw), -1).float() if flat.numel() else torch.zeros(len(raw), 0)


def _itemsize(dtype: str) -> int:
    return _DTYPES[dtype].itemsize


def _check_width(column: str, values: np.ndarray, expected: int, where: str) -> None:
    if values.shape[1] != expected:
        raise UserError(
            f"Expected {expected} values of each token under `{column}`, as the compression config says, but {where} "
            f"has {values.shape[1]}: name the config that the source was written with under --compression."
        )
