"""Scaling of the gradients that were stored with a loss: by the incoming one, and by the number of valid tokens.

Legend: N tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor

from ._plan import host_can_read, row_blocks


def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """Multiply `grad` by `scale`, in the precision of `scale`, and round once to `dtype`.

    Args:
        grad (Tensor): ``[N, V]`` (or any 2-D or 1-D tensor).
        scale (Tensor): 0-d, or ``[N, 1]``, in the working dtype.
        dtype (torch.dtype): of the result.
        in_place (bool): write over `grad` where it has that dtype.
    """
    in_place = in_place and grad.dtype == dtype
    if scale.dim() == 0 and host_can_read(scale.device) and bool(scale == 1):
        return grad if in_place else grad.to(dtype, copy=True)
    out = grad if in_place else torch.empty_like(grad, dtype=dtype)
    if grad.dtype == scale.dtype and (dtype == grad.dtype or grad.device.type == "cuda"):
        return torch.mul(grad, scale, out=out)
    # block by block, because PyTorch on a CPU first converts whole tensors of another dtype, and everywhere a number in
    # fp32 to the bf16 of the tensor that it multiplies
    for rows in row_blocks(len(grad), math.prod(grad.shape[1:]), grad.device):
        out[rows] = grad[rows].to(scale.dtype) * (scale if scale.dim() == 0 else scale[rows])
    return out


def retains_graph() -> bool:
    """Return whether the backward pass that runs was asked to retain the graph; True where PyTorch does not tell."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def mean_is_inside(backend: str, reduction: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the stored gradients are those of the mean already, so that ``backward()`` only hands them out.

    That takes the number of valid tokens: Triton's kernels read it on the device, PyTorch's arithmetic on the host. In
    fp16 the gradients of the sum are stored, because of the mean's those below 6e-8 would be lost.
    """
    return reduction == "mean" and dtype != torch.float16 and (backend == "triton" or host_can_read(device))


def mean_factor(count: Tensor, inside: bool) -> float:
    """Return what PyTorch's arithmetic multiplies the gradients by before they are stored; `count` is 0-d."""
    if inside and host_can_read(count.device):
        return 1.0 / max(1, int(count))
    return 1.0


def mean_scale(count: Tensor, inside: bool, scale: float = 1.0) -> Tensor | None:
    """Return what Triton's kernels multiply the gradients by before they are stored, 0-d on the device; None for 1."""
    if not inside:
        return None if scale == 1.0 else torch.full((), scale, dtype=torch.float32, device=count.device)
    # 1 / an integer would have the default dtype
    return count.clamp(min=1).float().reciprocal() * scale


def remaining_scale(grad_loss: Tensor, count: Tensor, reduction: str, backend: str, dtype: torch.dtype) -> Tensor:
    """Return what stored gradients have yet to be multiplied by: 0-d, or ``[N, 1]`` for reduction "none".

    Args:
        grad_loss (Tensor): the incoming gradient, 0-d or ``[N]``.
        count (Tensor): 0-d, number of valid tokens.
        reduction (str): of the loss.
        backend (str): of the loss arithmetic.
        dtype (torch.dtype): of the logits or hidden states.
    """
    if reduction == "none":
        return grad_loss.unsqueeze(-1)
    if reduction == "sum" or mean_is_inside(backend, reduction, dtype, count.device):
        return grad_loss
    return grad_loss / count.clamp(min=1)
