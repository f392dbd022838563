"""What a step on the meta device would allocate and compute, operation by operation.

Meta tensors have shape, dtype and storage, but no memory, so a step of any model costs a second or two on any host.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry


class Operation(NamedTuple):
    """One operation that computes something (views do not): what it does, and the memory it reads and writes."""

    phase: str
    flops: int
    bytes: int
    float8: bool = False  # a product of 8-bit floats


class Tracker(TorchDispatchMode):
    """While active, follows every storage from its first operation to its release.

    A storage is counted under a category: that of :meth:`hold`, or the phase that it was made in.

    Args:
        device (str): type of the devices to look at; others cost nothing.

    Attributes:
        phase (str): where the step is; set from outside.
        live (Counter[str]): bytes alive now, by category.
        peaks (dict[str, int]): highest number of bytes alive, all together, by phase.
        at_peaks (dict[str, dict[str, int]]): the categories at the highest point of each phase.
        operations (list[Operation]): in order.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self._device = device
        self.phase = ""
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, int] = {}
        self.at_peaks: dict[str, dict[str, int]] = {}
        self.operations: list[Operation] = []
        self._storages: dict[int, tuple[str, int, Any]] = {}
        self._total = 0

    def hold(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` under ``category`` from now on."""
        for tensor in plain_tensors(tensors):
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                self._release(key)
            self._add(tensor, category)
        self._look()

    def account(self, flops: int, size: int, *, float8: bool = False) -> None:
        """Count an operation that is not run here: its FLOPs, and the bytes that it reads and writes."""
        self.operations.append(Operation(self.phase, flops, size, float8))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # such as NF4Tensor, which takes itself apart; its parts come here again
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten.add.Tensor and self.phase == "backward" and not torch.is_grad_enabled():
            self._reuse(args[0])
        made = [tensor for tensor in _tensors(out) if tensor.device.type == self._device]
        is_new = [self._add(tensor, self.phase) for tensor in made]
        writes = func._schema.is_mutable
        if writes or any(is_new):
            count = _flop_formula(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count is not None else 0
            moved = sum(map(_size, made if not writes else made[:1]))
            moved += sum(_size(tensor) for tensor in _tensors((args, kwargs)) if tensor.device.type == self._device)
            self.operations.append(Operation(self.phase, flops, moved))
        self._look()
        return out

    def _add(self, tensor: Tensor, category: str) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False
        size = storage.nbytes()
        self._storages[key] = (category, size, weakref.ref(storage, functools.partial(self._release, key)))
        self.live[category] += size
        self._total += size
        return True

    def _reuse(self, gradient: Tensor) -> None:
        """Autograd adds a second gradient of the same tensor to the first one in place, but not under a mode."""
        key = gradient.untyped_storage()._cdata
        if key in self._storages:
            category, size, reference = self._storages[key]
            self._storages[key] = (category, 0, reference)
            self.live[category] -= size
            self._total -= size

    def _release(self, key: int, _: Any = None) -> None:
        category, size, _ = self._storages.pop(key)
        self.live[category] -= size
        self._total -= size

    def _look(self) -> None:
        if self._total > self.peaks.get(self.phase, 0):
            self.at_peaks[self.phase] = dict(self.live)
            self.peaks[self.phase] = self._total


@functools.cache
def _flop_formula(operation: Any) -> Any:
    """PyTorch's formula, which it lists for ``addmm`` and not for ``addmm_``; None for what is no product."""
    name = operation.__name__
    functional = getattr(torch.ops.aten, name[:-1], operation) if name.endswith("_") else operation
    return flop_registry.get(operation) or flop_registry.get(functional)


def plain_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors themselves, and of NF4 weights and 8-bit states the plain ones that they consist of."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            yield from plain_tensors(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def tensor_bytes(tensor: Tensor) -> int:
    """Return the memory of a tensor's elements; of NF4 weights and 8-bit states with their scales and code values."""
    return sum(map(_size, plain_tensors([tensor])))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
