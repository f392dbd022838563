"""The device, the versions on it, and the two rates that the other sections measure against."""

from typing import Any

import torch

from .._device import copy_rate, describe_device, instruction_rate, matrix_rate
from ..losses._implementations import versions
from ._job import Emit, Job, Row

TITLE = "The machine"
PARTS = ("",)


def run(job: Job, emit: Emit) -> None:
    """Describe the device first, then measure it."""
    from importlib.metadata import PackageNotFoundError, version

    found = versions()
    for name in ("torchao", "omegaconf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    row: Row = {"device": describe_device(job.device), "versions": found, "cuda": torch.version.cuda}
    if job.device == "cuda":
        row["name"] = torch.cuda.get_device_name()
        row["memory"] = torch.cuda.get_device_properties(0).total_memory
    emit(row)
    rates = {"copy_bytes": copy_rate(job.device), "matrix_flops": matrix_rate(job.device)}
    emit(rates | {"instructions": instruction_rate(job.device)})


def issue_text(rate: float | None) -> str:
    """Say how many instructions the device can issue, where that is known."""
    return f" It issues at most {rate / 1e9:.4g} billion instructions of a warp per second." if rate else ""


def facts(rows: list[Row]) -> dict[str, Any]:
    """Return everything that the section found, by name."""
    return {name: value for row in rows for name, value in row.items()}


def problems(rows: list[Row]) -> list[str]:
    return []


def render(rows: list[Row], found: dict[str, Any]) -> str:
    """The device, the versions, the rates."""
    lines = [found.get("device", "unknown device")]
    lines.append(", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items()))
    if "copy_bytes" in found:
        lines.append(
            f"A copy reads and writes {found['copy_bytes'] / 1e9:.4g} GB/s; a product of bf16 matrices reaches "
            f"{found['matrix_flops'] / 1e12:.4g} TFLOP/s." + issue_text(found.get("instructions"))
        )
    return "\n\n".join(lines)
