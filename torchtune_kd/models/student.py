"""The student: a decoder and its loss in one module.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

import contextlib
from typing import Any

from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from torchtune_kd.kernels import linear_kd_loss
from torchtune_kd.losses import KDLoss
from torchtune_kd.models.output_head import output_head, skip_output_head


class HostTensor:
    """A tensor that FSDP2 leaves on the host; it moves every tensor among a root's arguments to the device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Student(nn.Module):
    """A decoder and its loss in one module.

    The loss is computed inside ``forward`` because, under FSDP2, only there the head is a plain gathered tensor
    whose gradient goes through FSDP's own reduction (this module is the FSDP root).
    """

    def __init__(self, decoder: TransformerDecoder, kd_loss: KDLoss, kd_ratio: float) -> None:
        super().__init__()
        self.decoder = skip_output_head(decoder)
        self.kd_ratio = kd_ratio
        self._objective = kd_loss.settings()
        self.offload_activations = contextlib.nullcontext()
        self.keeps_layers_gathered = False  # between the microbatches of a step, under FSDP2

    def forward(
        self,
        tokens: Tensor,
        labels: HostTensor,
        teacher_hidden: Tensor | None,
        teacher_head: tuple[Tensor, Tensor | None] | None,
        metrics: tuple[str, ...],
        **attention: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one microbatch, summed over its valid tokens.

        Args:
            tokens (Tensor): [B, S] ids.
            labels (HostTensor): [B, S] next-token ids, already shifted; ``ignore_index`` where there is none.
            teacher_hidden (Tensor | None): [B, S, D_t] last hidden states; None at kd_ratio 0.
            teacher_head (tuple[Tensor, Tensor | None] | None): weight [V_t, D_t] and bias [V_t]; None at kd_ratio 0.
            metrics (tuple[str, ...]): names out of ``torchtune_kd.kernels.METRICS``.
            **attention: ``mask`` and ``input_pos`` of packed data.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: 0-d loss sum with its graph, and the metrics' sums (0-d, fp32).
        """
        with self.offload_activations:
            hidden = self.decoder(tokens, **attention)
        weight, bias = output_head(self.decoder)
        teacher_weight, teacher_bias = teacher_head or (None, None)
        return linear_kd_loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            labels.tensor,
            student_bias=bias,
            teacher_bias=teacher_bias,
            kd_ratio=self.kd_ratio,
            reduction="sum",
            return_metrics=metrics,
            **self._objective,
        )
