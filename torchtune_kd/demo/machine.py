"""What the demo asks of the machine that it runs on."""

import resource
import sys
import time

import torch


def faster_dtype() -> str:
    """Return bf16 or fp32, whichever multiplies matrices of this model's size faster.

    CPUs without bf16 units emulate it.
    """
    seconds = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, weight = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return min(seconds, key=seconds.get)


def peak_memory() -> int:
    """Return the largest resident set, in bytes, that this process or one of its children ever had."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds)
    return peak if sys.platform == "darwin" else peak * 1024
