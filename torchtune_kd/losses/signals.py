"""What a loss is measured against: what a teacher says about a batch.

Shapes: B batch, S sequence, D hidden width of the teacher, V vocabulary.
"""

from typing import NamedTuple

from torch import Tensor

from torchtune_kd.kernels import Float8Weight


class Head(NamedTuple):
    """The linear map from hidden states to logits."""

    weight: Tensor | Float8Weight  # [V, D]
    bias: Tensor | None  # [V]


class Hidden(NamedTuple):
    """Last hidden states and the head that reads them, so that no logits are held for a whole batch."""

    states: Tensor  # [B, S, D]
    head: Head


Signal = Hidden
