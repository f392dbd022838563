"""What the vendor's datasheets say of a GPU."""

import dataclasses
import difflib
import re
from dataclasses import dataclass

from torchtune_kd.errors import UserError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Device:
    """Peaks of one GPU.

    Attributes:
        name (str): as in ``gpu=...``.
        memory (int): bytes; GPUs are sold in GB and hold as many GiB, to within a few percent.
        tflops (dict[str, float]): dense, by dtype; fp32 without TF32, which PyTorch leaves off.
        bandwidth (float): of its memory, GB/s.
        link (float): to the other GPUs of its node, GB/s in one direction.
        source (str): where the figures are from.
        float8 (bool): multiplies 8-bit floats: compute capability 8.9 and later.
    """

    name: str
    memory: int
    tflops: dict[str, float]
    bandwidth: float
    link: float
    source: str
    float8: bool = True


def _gpu(
    name: str, gib: int, bf16: float, fp32: float, bandwidth: float, link: float, source: str, float8: bool = True
) -> Device:
    return Device(name, gib * 2**30, {"bf16": bf16, "fp32": fp32}, bandwidth, link, source, float8)


DEVICES = (
    _gpu("A100", 80, 312, 19.5, 2039, 300, "NVIDIA A100 80GB SXM datasheet, June 2021", float8=False),
    _gpu("H100", 80, 989.5, 67, 3350, 450, "NVIDIA H100 SXM datasheet (bf16 without sparsity: half of 1979)"),
    _gpu("H200", 141, 989.5, 67, 4800, 450, "NVIDIA H200 SXM datasheet (bf16 without sparsity: half of 1979)"),
    _gpu("B200", 180, 2250, 75, 8000, 900, "NVIDIA HGX B200 and DGX B200 datasheets, an eighth of eight GPUs"),
    _gpu("L40S", 48, 362.05, 91.6, 864, 32, "NVIDIA L40S datasheet; PCIe 4.0 x16"),
    _gpu("RTX4090", 24, 165.2, 82.6, 1008, 32, "NVIDIA Ada architecture whitepaper, fp32 accumulation; PCIe 4.0 x16"),
)


def find_device(name: str) -> Device:
    """Find the device of that name, whatever its case, spaces and dashes.

    Raises:
        UserError: if the table has none.
    """
    known = {_plain(device.name): device for device in DEVICES}
    if _plain(name) in known:
        return known[_plain(name)]
    near = difflib.get_close_matches(_plain(name), known, n=1)
    names = ", ".join(device.name for device in DEVICES)
    raise UserError(
        f"Expected `gpu` to be one of {names}, got {name}: "
        + (f"did you mean {known[near[0]].name}?" if near else "give `tflops=` and `bandwidth=` for another one.")
    )


def custom_device(
    base: Device | None, dtype: str, tflops: float | None, bandwidth: float | None, link: float | None
) -> Device | None:
    """Put figures of the user's into ``base``; without ``base`` it takes both of the first two.

    Raises:
        UserError: for a figure that is not above 0, or one without the other.
    """
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth), ("link_bandwidth", link)):
        if value is not None and not value > 0:
            raise UserError(f"Expected `{name}` to be a number above 0, got {value}: change it.")
    if tflops is bandwidth is link is None:
        return base
    if base is None:
        if tflops is None or bandwidth is None:
            raise UserError(
                "Expected `tflops` (dense, of the run's dtype) and `bandwidth` (GB/s of the device's memory) together, "
                "or the name of a `gpu` whose figures they replace: add what is missing."
            )
        return Device("given", 0, {dtype: tflops}, bandwidth, link or 0.0, "given on the command line")
    return dataclasses.replace(
        base,
        name=f"{base.name}, changed",
        tflops={**base.tflops, dtype: tflops or base.tflops[dtype]},
        bandwidth=bandwidth or base.bandwidth,
        link=link or base.link,
        source=f"{base.source}, and the command line",
    )


def parse_memory(text: str | int) -> int:
    """Parse a size like ``80GiB``, ``24 GB`` or a plain number of bytes.

    Raises:
        UserError: if it cannot be read.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match.group(2).upper() if match else ""
    if match is None or (unit or "B") not in _UNITS or float(match.group(1)) == 0:
        raise UserError(f"Expected `device_memory` to be a size such as 80GiB or 24GB, got {text}: change it.")
    return int(float(match.group(1)) * _UNITS[unit or "B"])


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|geforce|nvidia", "", str(name).lower())
