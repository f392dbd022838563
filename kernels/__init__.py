"""Knowledge-distillation losses as functions of plain tensors.

This folder depends on PyTorch, and on Triton for CUDA tensors, and may be copied into another project.
"""

from ._api import linear_kd_loss, softmax_kd_loss
from ._metrics import METRICS
from ._objective import DIVERGENCES, Objective

__all__ = ["DIVERGENCES", "METRICS", "Objective", "linear_kd_loss", "softmax_kd_loss"]
