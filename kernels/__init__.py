"""Knowledge-distillation losses as functions of plain tensors.

This folder depends on PyTorch, and on Triton for CUDA tensors, and may be copied into another project. ``__all__`` is
what other code can rely on; the names after it serve the package that this folder comes from, and may change with it.
"""

from ._api import linear_kd_loss, linear_sparse_kd_loss, softmax_kd_loss
from ._call import float8_weight
from ._float8 import Float8Weight
from ._objective import DIVERGENCES, METRICS, SPARSE_METRICS, Objective

__all__ = [
    "DIVERGENCES",
    "METRICS",
    "SPARSE_METRICS",
    "Float8Weight",
    "Objective",
    "float8_weight",
    "linear_kd_loss",
    "linear_sparse_kd_loss",
    "softmax_kd_loss",
]

from ._call import linear_kd_objective as linear_kd_objective
from ._call import softmax_kd_objective as softmax_kd_objective
from ._checks import shared_vocab as shared_vocab
from ._float8 import has_float8_product as has_float8_product
from ._meta import on_meta as on_meta
from ._objective import TEMPERATURES as TEMPERATURES
from ._sparse import linear_sparse_kd_objective as linear_sparse_kd_objective
