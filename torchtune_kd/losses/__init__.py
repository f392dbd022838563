"""Knowledge-distillation losses to be named in a recipe's YAML. Importing them does not import torchtune."""

from torchtune_kd.losses.base import KDLoss, KDWithChunkedOutputLoss
from torchtune_kd.losses.divergences import (
    ForwardKLLoss,
    ForwardKLWithChunkedOutputLoss,
    JSDLoss,
    JSDWithChunkedOutputLoss,
    ReverseKLLoss,
    ReverseKLWithChunkedOutputLoss,
    SkewForwardKLLoss,
    SkewForwardKLWithChunkedOutputLoss,
    SkewReverseKLLoss,
    SkewReverseKLWithChunkedOutputLoss,
    SymmetricKLLoss,
    SymmetricKLWithChunkedOutputLoss,
    TVDLoss,
    TVDWithChunkedOutputLoss,
)

__all__ = [
    "ForwardKLLoss",
    "ForwardKLWithChunkedOutputLoss",
    "JSDLoss",
    "JSDWithChunkedOutputLoss",
    "KDLoss",
    "KDWithChunkedOutputLoss",
    "ReverseKLLoss",
    "ReverseKLWithChunkedOutputLoss",
    "SkewForwardKLLoss",
    "SkewForwardKLWithChunkedOutputLoss",
    "SkewReverseKLLoss",
    "SkewReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss",
    "SymmetricKLWithChunkedOutputLoss",
    "TVDLoss",
    "TVDWithChunkedOutputLoss",
]
