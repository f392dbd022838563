"""Record where a figure comes from: packages, machine, load, source."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from torchtune_kd._versions import installed_versions


def provenance(device: torch.device, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a result that say where it was measured, by name."""
    return {
        "config": config_sha(config),
        "commit": _commit(),
        "versions": installed_versions(),
        **moment(device, torch.get_num_threads()),
    }


def moment(device: torch.device, threads: int) -> dict[str, Any]:
    """Return the fields of a result that say on what machine, and when, by name.

    Args:
        device (torch.device): that measured.
        threads (int): of a CPU.
    """
    return {
        "machine": _machine(device, threads),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def config_sha(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, whatever their order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # another system than Linux, or a processor without a name: what Python says of it stays
    return f"{model}, {threads} threads"


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with "+" where files differ from it."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")
