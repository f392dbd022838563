"""What a call would allocate and multiply on a device that need not be there: the loss of meta tensors.

Meta tensors have shapes and storages but no memory and no values, so that a forecast of a run costs next to nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

# stands where the name of a backend does; chosen inside of `on_meta` alone
META = "meta"


class _OnMeta(NamedTuple):
    """Hold the arguments of :func:`on_meta`."""

    device: torch.device
    account: Callable[[int], object]
    account_product: Callable[[int, int], object]


_arguments: ContextVar["_OnMeta | None"] = ContextVar("on_meta", default=None)


@contextmanager
def on_meta(
    device: torch.device | str,
    account: Callable[[int], object] = lambda size: None,
    account_product: Callable[[int, int], object] = lambda flops, size: None,
) -> Iterator[None]:
    """Let ``linear_kd_loss`` of meta tensors, and its backward pass, do what they would do on `device`, without values.

    It makes the same matrix products in the same chunks, and the same allocations: buffers of logits, gradients, and
    the workspace of PyTorch's arithmetic. With Triton, on CUDA, there is none, but with stored ids what is k + 1 wide.
    The arithmetic on a chunk is left out, and its results are only allocated. Labels may be on the CPU, and then
    ignored tokens are dropped. One thread at a time.

    Args:
        device (torch.device | str): whose sizes of chunks and workspaces are taken, and whose ``backend="auto"``.
        account (Callable[[int], object]): told for each chunk the bytes that its arithmetic would read and write.
        account_product (Callable[[int, int], object]): told the FLOPs and the bytes of each product of 8-bit floats,
            which is left out too.
    """
    token = _arguments.set(_OnMeta(torch.device(device), account, account_product))
    try:
        yield
    finally:
        _arguments.reset(token)


def stands_for(device: torch.device) -> torch.device:
    """Return the device whose sizes count: inside :func:`on_meta` the one that the meta device stands for."""
    arguments = _arguments.get()
    return device if arguments is None or device.type != "meta" else arguments.device


def account(size: int) -> None:
    """Tell the caller of :func:`on_meta` that so many bytes would be read and written."""
    if (arguments := _arguments.get()) is not None:
        arguments.account(size)


def account_product(flops: int, size: int) -> None:
    """Tell the caller of :func:`on_meta` of a product of 8-bit floats: its FLOPs, and the bytes it reads and writes."""
    if (arguments := _arguments.get()) is not None:
        arguments.account_product(flops, size)
