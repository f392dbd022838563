r"""The seven divergences as components, each for whole and for chunked logits.

p is the teacher's distribution, q the student's, both at temperature T. Settings are those of
:class:`~torchtune_kd.losses.KDLoss`; formulas and limits are those of
:func:`torchtune_kd.kernels.softmax_kd_loss`.
"""

from typing import Any

from torchtune_kd.losses.base import KDLoss, KDWithChunkedOutputLoss


class ForwardKLLoss(KDLoss):
    """KL(p‖q) = Σ p·log(p/q): the student covers all that the teacher does. Hinton et al. 2015.

    torchtune's loss of this name is the soft cross-entropy, larger by the teacher's entropy; the gradient is
    equal.
    """

    divergence = "forward_kl"


class ReverseKLLoss(KDLoss):
    """KL(q‖p) = Σ q·log(q/p): the student avoids what the teacher does not do. MiniLLM, Gu et al. 2024."""

    divergence = "reverse_kl"


def _one_of(beta: float | None, sym_kd_ratio: float | None) -> float | None:
    if sym_kd_ratio is not None and beta is not None:
        raise ValueError(
            f"beta and sym_kd_ratio are two names of one setting, but got beta={beta} and "
            f"sym_kd_ratio={sym_kd_ratio}; give one of them"
        )
    return beta if sym_kd_ratio is None else sym_kd_ratio


class _SymmetricSettings:
    """torchtune calls β `sym_kd_ratio`; both names are understood, here and as attributes."""

    divergence = "symmetric_kl"
    beta: float  # KDLoss sets it

    @property
    def sym_kd_ratio(self) -> float:
        """β under torchtune's name."""
        return self.beta


class SymmetricKLLoss(_SymmetricSettings, KDLoss):
    """β·KL(p‖q) + (1-β)·KL(q‖p), β = 0.5 by default; torchtune's name for β, `sym_kd_ratio`, works too.

    Args:
        sym_kd_ratio (float | None): another name of `beta`; the first argument, as in torchtune.
        ignore_index (int): label of the tokens that do not count.
        beta (float | None): β.
        **settings: those of :class:`KDLoss`.
    """

    def __init__(
        self,
        sym_kd_ratio: float | None = None,
        ignore_index: int = -100,
        *,
        beta: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(ignore_index, beta=_one_of(beta, sym_kd_ratio), **settings)


class JSDLoss(KDLoss):
    """β·KL(p‖m) + (1-β)·KL(q‖m) with m = βp + (1-β)q, β = 0.5 by default. GKD, Agarwal et al. 2024.

    β = 0 means KL(p‖q) and β = 1 means KL(q‖p), as in TRL.
    """

    divergence = "jsd"


class SkewForwardKLLoss(KDLoss):
    """KL(p ‖ βp + (1-β)q), β = 0.1 by default. DistiLLM, Ko et al. 2024."""

    divergence = "skew_forward_kl"


class SkewReverseKLLoss(KDLoss):
    """KL(q ‖ (1-β)p + βq), β = 0.1 by default. DistiLLM, Ko et al. 2024."""

    divergence = "skew_reverse_kl"


class TVDLoss(KDLoss):
    """Total variation distance ½ Σ |p - q|. f-distill, Wen et al. 2023."""

    divergence = "tvd"


class ForwardKLWithChunkedOutputLoss(KDWithChunkedOutputLoss):
    """:class:`ForwardKLLoss` over chunks of logits."""

    divergence = "forward_kl"


class ReverseKLWithChunkedOutputLoss(KDWithChunkedOutputLoss):
    """:class:`ReverseKLLoss` over chunks of logits."""

    divergence = "reverse_kl"


class SymmetricKLWithChunkedOutputLoss(_SymmetricSettings, KDWithChunkedOutputLoss):
    """:class:`SymmetricKLLoss` over chunks of logits; arguments in torchtune's order."""

    def __init__(
        self,
        num_output_chunks: int = 8,
        sym_kd_ratio: float | None = None,
        ignore_index: int = -100,
        *,
        beta: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_output_chunks, ignore_index, beta=_one_of(beta, sym_kd_ratio), **settings)


class JSDWithChunkedOutputLoss(KDWithChunkedOutputLoss):
    """:class:`JSDLoss` over chunks of logits."""

    divergence = "jsd"


class SkewForwardKLWithChunkedOutputLoss(KDWithChunkedOutputLoss):
    """:class:`SkewForwardKLLoss` over chunks of logits."""

    divergence = "skew_forward_kl"


class SkewReverseKLWithChunkedOutputLoss(KDWithChunkedOutputLoss):
    """:class:`SkewReverseKLLoss` over chunks of logits."""

    divergence = "skew_reverse_kl"


class TVDWithChunkedOutputLoss(KDWithChunkedOutputLoss):
    """:class:`TVDLoss` over chunks of logits."""

    divergence = "tvd"
