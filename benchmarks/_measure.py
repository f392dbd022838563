"""What the benchmarks share: time, peak memory, and on what they were measured. Linux only."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Measurement(NamedTuple):
    """Cost of one call."""

    seconds: float
    cpu_seconds: float  # of all threads; on a busy machine the steadier of the two
    added_bytes: int  # high-water mark of resident memory during the call, above what was resident before


def measure(call: Callable[[], object]) -> Measurement:
    """Time one call and the resident memory it adds; use a process of its own for each side of a comparison."""
    release_free_memory()
    before = resident_bytes()
    reset_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Measurement(seconds, cpu_seconds, peak_bytes() - before)


def release_free_memory() -> None:
    """Hand memory that Python and malloc keep for later back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    """High-water mark of resident memory since the process began or :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def describe_machine() -> str:
    """CPU, cores, threads, load and versions, in one line."""
    return (
        f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads "
        f"(OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}), "
        f"bf16 instructions: {_bf16_instructions()}, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _bf16_instructions() -> str:
    """Name what decides the speed of bf16 matrix products on an x86 CPU."""
    flags = _cpu_info("flags").split()
    return " and ".join(name for name in ("amx_bf16", "avx512_bf16") if name in flags) or "none"


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.machine()


def _cpu_info(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: these benchmarks need Linux")
