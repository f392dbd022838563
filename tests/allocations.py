"""Follow what a piece of code allocates and multiplies on one device, whether that has memory or not."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Memory(TorchDispatchMode):
    """Follows the storages of one device: their sizes, the most bytes alive at a time, and the matrix products."""

    def __init__(self, device):
        super().__init__()
        self.device, self.alive, self.peak, self.made, self.products = device, {}, 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.products.append((name, tuple(a.shape), tuple(b.shape)))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        if storage._cdata in self.alive:
            return
        key, size = storage._cdata, storage.nbytes()
        self.alive[key] = size, weakref.ref(storage, lambda _: self.alive.pop(key))
        self.made.append(size)
        self.peak = max(self.peak, sum(size for size, _ in self.alive.values()))
