"""The operations of a call for which a host waits, where its tensors are a device's."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtune_kd.kernels import _checks, _plan, _scaling, _softmax, _sparse_checks
from torchtune_kd.kernels._torch import divergences

READING = {"nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "masked_select", "unique_dim"}


def as_another_device(monkeypatch) -> None:
    """Let the CPU be a device that the host waits for."""
    for module in (_softmax, _checks, _plan, _scaling, _sparse_checks, divergences):
        monkeypatch.setattr(module, "host_can_read", lambda device: False)


class Waits(TorchDispatchMode):
    """Note in ``found`` the operations that read values, or sizes that depend on some, in ``seen`` the names of all."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.add(name)
        by_mask = any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for index in arg
        )
        if by_mask or name in READING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
