"""What all losses share: settings, checks, and the two ways to be called.

Legend: N tokens, V vocabulary, B batch, S sequence.
"""

import functools
import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from torchtune_kd.kernels import Objective, softmax_kd_loss


class LossSettings(TypedDict):
    """Keyword arguments of the functions of :mod:`torchtune_kd.kernels` that a loss decides on."""

    divergence: str
    beta: float | None
    temperature: float
    ignore_index: int
    scale_by_temperature_squared: bool


class KDLoss(nn.Module):
    r"""Mean over the valid tokens of :math:`T^2 D(p_T, q_T)`, a divergence of student q from teacher p.

    A subclass names its divergence; the mathematics is in :mod:`torchtune_kd.kernels`. Recipes that hold
    hidden states instead of logits pass :meth:`settings` on to :func:`torchtune_kd.kernels.linear_kd_loss`.

    Args:
        ignore_index (int): label of the tokens that do not count; the first argument, as in torchtune.
        beta (float | None): parameter of the divergence in [0, 1]; None takes its default.
        temperature (float): T in [0.001, 1000], divides both models' logits.
        scale_by_temperature_squared (bool): multiply by T² (Hinton et al. 2015), which keeps the size of the
            gradient comparable across temperatures.

    Attributes:
        divergence (str): name of D, as :func:`torchtune_kd.kernels.softmax_kd_loss` knows it.

    Raises:
        ValueError: if a setting is unknown or out of range.
    """

    divergence: ClassVar[str]

    def __init__(
        self,
        ignore_index: int = -100,
        *,
        beta: float | None = None,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        self._refuse(unknown)
        objective = Objective(
            divergence=self.divergence,
            beta=beta,
            temperature=temperature,
            ignore_index=ignore_index,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )
        self.beta = objective.beta
        self.temperature = objective.temperature
        self.ignore_index = objective.ignore_index
        self.scale_by_temperature_squared = objective.scale_by_temperature_squared

    def _refuse(self, unknown: dict[str, Any]) -> None:
        if not unknown:
            return
        own = type(self).__mro__[: type(self).__mro__.index(nn.Module)]
        parameters = (p for cls in own for p in inspect.signature(cls).parameters.values())
        known = sorted({p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)})
        name = next(iter(unknown))
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}" if near else f"it has {', '.join(known)}"
        raise ValueError(f"{type(self).__name__} has no setting {name}; {hint}")

    def settings(self) -> LossSettings:
        """Keyword arguments that make the functions of :mod:`torchtune_kd.kernels` compute this loss."""
        return {
            "divergence": self.divergence,
            "beta": self.beta,
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
            "scale_by_temperature_squared": self.scale_by_temperature_squared,
        }

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """Compute the loss of whole logits.

        Args:
            student_logits (Tensor): ``[N, V]`` or ``[B, S, V]``, any floating dtype.
            teacher_logits (Tensor): the same leading shape, not requiring grad.
            labels (Tensor): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`; they say which
                tokens count, nothing else.
            normalize (bool): False returns the sum over the valid tokens instead of their mean.

        Returns:
            Tensor: 0-d, fp32 (fp64 for fp64 logits), never negative; 0 without a valid token.

        Raises:
            ValueError: if shapes, dtypes or vocabularies do not fit.
        """
        if labels is None:
            raise ValueError("labels [N] or [B, S] are needed to know the valid tokens, but got None")
        reduction = "mean" if normalize else "sum"
        loss = softmax_kd_loss(student_logits, teacher_logits, labels, reduction=reduction, **self.settings())
        assert isinstance(loss, Tensor)  # metrics would come with it, but none are asked for
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items() if value is not None)


class KDWithChunkedOutputLoss(KDLoss):
    """The same loss over lists of logit chunks, as torchtune's ``TransformerDecoder`` gives them.

    Args:
        num_output_chunks (int): chunks the sequence is cut into; must equal that of the cross-entropy loss.
        ignore_index (int): as in :class:`KDLoss`, like the arguments that follow.
        beta (float | None): parameter of the divergence in [0, 1]; None takes its default.
        temperature (float): T in [0.001, 1000].
        scale_by_temperature_squared (bool): multiply by T².

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        num_output_chunks: int = 8,
        ignore_index: int = -100,
        *,
        beta: float | None = None,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__(
            beta=beta,
            temperature=temperature,
            ignore_index=ignore_index,
            scale_by_temperature_squared=scale_by_temperature_squared,
            **unknown,
        )
        if isinstance(num_output_chunks, bool) or not isinstance(num_output_chunks, int) or num_output_chunks < 1:
            raise ValueError(f"num_output_chunks must be a whole number above 0, but got {num_output_chunks!r}")
        self.num_output_chunks = num_output_chunks

    def forward(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """Compute the loss of chunked logits, normalised once over all valid tokens.

        Args:
            student_logits (Sequence[Tensor]): chunks ``[B, S_i, V]`` with the S_i adding up to S. Their
                number may be below `num_output_chunks`, which ``Tensor.chunk`` does not always reach.
            teacher_logits (Sequence[Tensor]): chunks of the same leading shapes.
            labels (Tensor): ``[B, S]``.
            normalize (bool): False returns the sum over the valid tokens instead of their mean.

        Returns:
            Tensor: 0-d, fp32 (fp64 for fp64 logits), never negative; 0 without a valid token.

        Raises:
            ValueError: if the chunks do not fit each other or the labels.
        """
        sizes = _chunk_sizes(student_logits, teacher_logits, labels)
        of_chunk = super().forward
        chunks = zip(student_logits, teacher_logits, labels.split(sizes, dim=1), strict=True)
        total = functools.reduce(torch.add, (of_chunk(*chunk, normalize=False) for chunk in chunks))
        if not normalize:
            return total
        return total / (labels != self.ignore_index).sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"num_output_chunks={self.num_output_chunks}, {super().extra_repr()}"


def _chunk_sizes(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> list[int]:
    """Tokens of each chunk along the sequence.

    Raises:
        ValueError: if the two models' chunks differ in shape or do not cover the labels.
    """
    for name, chunks in (("student_logits", student), ("teacher_logits", teacher)):
        listed = isinstance(chunks, (list, tuple)) and len(chunks) > 0
        if not listed or any(not isinstance(chunk, Tensor) or chunk.dim() != 3 for chunk in chunks):
            raise ValueError(
                f"{name} must be a list of chunks [B, S/num_chunks, V] for a chunked loss; call "
                f"model.set_num_output_chunks, or use the loss without WithChunkedOutput for whole logits"
            )
    shapes = [[list(chunk.shape[:-1]) for chunk in chunks] for chunks in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"student and teacher chunks must have one [B, S] each, but got {shapes[0]} and {shapes[1]}")
    sizes = [size for _, size in shapes[0]]
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[1] != sum(sizes):
        found = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor [B, {sum(sizes)}] to fit the chunks, but got {found}")
    return sizes
