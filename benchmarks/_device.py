"""Time, memory and rates of a device, a CUDA GPU or the CPU. What the CPU alone needs is in ``_measure.py``."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from ._measure import describe_machine, measure

FLUSH_BYTES = 2**28  # larger than any L2 cache; a cache of 50 MB keeps nothing of the inputs
LEAST_REPEATS, MOST_REPEATS = 3, 50


class Times(NamedTuple):
    """Seconds of the calls of one implementation."""

    warm_up: float  # the first call: imports, compilation, allocation
    calls: list[float]
    cpu: float | None = None  # mean over the calls, of all threads: where others use the CPU too, the steadier number
    host: float | None = None  # that the host takes to queue a call; of a GPU

    @property
    def median(self) -> float:
        return median(self.calls)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_calls(call: Callable[[], object], device: str, budget: float) -> Times:
    """Calls to warm up, then as many as fit into `budget` seconds: at least 3, at most 50.

    The cache is flushed before each. On a GPU the calls are queued without waiting for one another; what is timed is
    the time between two CUDA events.
    """
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.int8, device=device)
    warm_up = _stopwatch(call, device)
    if device != "cuda":
        calls, cpu = [], 0.0
        while len(calls) < LEAST_REPEATS or (sum(calls) < budget and len(calls) < MOST_REPEATS):
            flush.add_(1)
            start = time.process_time()
            calls.append(_stopwatch(call, device))
            cpu += time.process_time() - start
        return Times(warm_up, calls, cpu / len(calls))
    host, once = map(min, zip(*(_queued(call, device) for _ in range(2)), strict=True))
    repeats = min(MOST_REPEATS, max(LEAST_REPEATS, int(budget / max(once, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.add_(1)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return Times(warm_up, [start.elapsed_time(end) / 1000 for start, end in events], host=host)


def added_bytes(call: Callable[[], object], device: str) -> int:
    """High-water mark of one call above what was there before, with what the call returns."""
    if device != "cuda":
        return measure(call).added_bytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def copy_rate(device: str) -> float:
    """Bytes read plus bytes written per second by a copy that no cache holds."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.bfloat16, device=device).fill_(1)
    target = torch.empty_like(source)
    times = time_calls(lambda: target.copy_(source), device, budget=0.5)
    return 2 * source.nbytes / min(times.calls)


def matrix_rate(device: str) -> float:
    """Operations per second of bf16 matrix products: the better of a square one and one with an output head."""
    shapes = [(8192, 8192, 8192), (2048, 4096, 128256)] if device == "cuda" else [(512, 2048, 8192), (256, 2048, 49152)]
    return max(_product_rate(device, *shape) for shape in shapes)


def _product_rate(device: str, rows: int, inner: int, columns: int) -> float:
    def normal(*shape: int) -> Tensor:
        # as in the cases: the power that a GPU draws, and so its clock, depends on the numbers
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()

    left, right = normal(rows, inner), normal(columns, inner)
    out = left.new_empty(rows, columns)
    times = time_calls(lambda: torch.mm(left, right.t(), out=out), device, budget=0.5)
    return 2 * rows * inner * columns / min(times.calls)


def instruction_rate(device: str) -> float | None:
    """Return the instructions of a warp (32 threads) that a GPU can issue per second; None for a CPU.

    Each SM has four schedulers, which issue one in a clock; the clock is what the device reaches when this is called.
    """
    if device != "cuda":
        return None
    cycles = 10_000_000
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(cycles)  # counts clocks on the device; the first one lets it leave a lower clock
    events[0].record()
    torch.cuda._sleep(cycles)
    events[1].record()
    torch.cuda.synchronize()
    clock = cycles / (events[0].elapsed_time(events[1]) / 1000)
    return 4 * torch.cuda.get_device_properties(0).multi_processor_count * clock


def describe_device(device: str) -> str:
    """The device in one line."""
    if device != "cuda":
        return describe_machine()
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    return (
        f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB, "
        f"L2 {getattr(properties, 'L2_cache_size', 0) / 2**20:.0f} MiB, capability {major}.{minor}, "
        f"CUDA {torch.version.cuda}; host: {describe_machine()}"
    )


def _stopwatch(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, waiting for the device before and after."""
    return _queued(call, device)[1]


def _queued(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds until one call came back, and until the device was done with it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    queued = time.perf_counter()
    synchronize(device)
    return queued - start, time.perf_counter() - start
