"""Where the host waits for the device."""

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SENTENCE = "called a synchronizing CUDA operation"
# operations whose results the host has to read, where they run on a device
_READING = ("nonzero", "_local_scalar_dense", "equal", "masked_select", "unique_dim", "_unique2")


class WaitCounter:
    """Counts waits between ``start`` and ``stop`` by the line of Python that caused them.

    On CUDA it asks PyTorch (``torch.cuda.set_sync_debug_mode``), which knows its own waits and not those of libraries.
    On a CPU, which waits for nothing, it counts the operations that would have to wait on a device.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def start(self) -> None:
        if not self._cuda:
            self._mode = _ReadingOperations()
            self._mode.__enter__()
            return
        self._warnings = warnings.catch_warnings(record=True)
        self._caught = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> dict[str, int]:
        """Return how often each place waited."""
        if not self._cuda:
            self._mode.__exit__(None, None, None)
            return dict(self._mode.places)
        torch.cuda.set_sync_debug_mode("default")
        caught = self._caught
        self._warnings.__exit__(None, None, None)
        return dict(Counter(_place(w.filename, w.lineno) for w in caught if _SENTENCE in str(w.message)))


class _ReadingOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in _READING:
            frame = sys._getframe(1)
            while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.places[_place(frame.f_code.co_filename, frame.f_lineno)] += 1
        return func(*args, **(kwargs or {}))


def _place(file: str, line: int) -> str:
    """The last two folders of the path and the line: ``torchtune_kd/training/log.py:30``."""
    return f"{'/'.join(Path(file).parts[-3:])}:{line}"


def runtime_waits(call: Any) -> int | None:
    """Return how often the CUDA runtime was asked to wait during ``call``, libraries included; None if unknown.

    What the profiler itself asks for, counted in a run of nothing, is taken off.
    """
    try:
        return _profiled(call) - _profiled(lambda: None)
    except Exception:  # a profiler that does not work here leaves the other count
        return None


def _profiled(call: Any) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
    names = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
    return sum(event.count for event in profiled.key_averages() if event.key in names)
