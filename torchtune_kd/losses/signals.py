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


class Sparse(NamedTuple):
    """Some log-probabilities of each valid token, in the order of the batch, and the mass of the rest.

    See :func:`torchtune_kd.kernels.linear_sparse_kd_loss`. Shapes: n valid tokens, k ids.
    """

    ids: Tensor  # [n, k], -1 pads
    log_probs: Tensor  # [n, k] at T = 1; of drawn ids log(count / draws)
    tail: Tensor | None  # [n] at the run's temperature
    tail_at_1: Tensor | None  # [n]
    entropy: Tensor | None  # [n] of the whole teacher
    sampled: bool


class Hidden(NamedTuple):
    """Last hidden states and the head that reads them, so that no logits are held for a whole batch.

    Of an ensemble there are several of both; see :func:`torchtune_kd.kernels.linear_kd_loss` for ``shares`` and
    ``mix``.
    """

    states: tuple[Tensor, ...]  # [B, S, D] each
    heads: tuple[Head, ...]
    shares: tuple[float, ...] = (1.0,)
    mix: str = "probabilities"


class ByRow(NamedTuple):
    """Signals of several teachers, each for some rows of the batch, every row once at most."""

    rows: tuple[tuple[int, ...], ...]  # of each teacher
    signals: tuple[Hidden | Sparse, ...]  # of these rows; where there are none, of one without a label


Signal = Hidden | Sparse | ByRow
