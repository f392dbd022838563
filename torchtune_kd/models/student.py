"""The student: a decoder and its loss in one module.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerDecoder

from torchtune_kd.data.batches import Batch
from torchtune_kd.errors import phase
from torchtune_kd.kernels import Objective, linear_kd_objective, linear_sparse_kd_objective
from torchtune_kd.losses import KDLoss
from torchtune_kd.losses.signals import ByRow, Hidden, Signal, Sparse
from torchtune_kd.models.output_head import output_head, skip_output_head


class Student(nn.Module):
    """A decoder and its loss in one module.

    The loss is computed inside ``forward`` because, under FSDP2, only there the head is a plain gathered tensor
    whose gradient goes through FSDP's own reduction (this module is the FSDP root).
    """

    def __init__(self, decoder: TransformerDecoder, kd_loss: KDLoss, kd_ratio: float) -> None:
        super().__init__()
        self.decoder = skip_output_head(decoder)
        self._objective = Objective(kd_ratio=kd_ratio, **kd_loss.settings())
        self.ignore_index = kd_loss.ignore_index
        self.offload_activations = contextlib.nullcontext()
        self.keeps_layers_gathered = False  # between the microbatches of a step, under FSDP2

    def prepare_microbatch(self, *, is_last: bool) -> None:
        """Let FSDP2 reduce gradients, and give gathered parameters back, in a step's last microbatch alone."""
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(is_last)
            self.set_reshard_after_backward(is_last, recurse=self.keeps_layers_gathered)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with phase("student forward"):  # FSDP2 gathers before ``forward`` begins
            return super().__call__(*args, **kwargs)

    def forward(
        self, batch: Batch, signal: Signal | None, metrics: tuple[str, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and metrics of one microbatch, summed over its valid tokens.

        Args:
            batch (Batch): on the student's device.
            signal (Signal | None): what the teacher gave for it; None at kd_ratio 0.
            metrics (tuple[str, ...]): names out of ``torchtune_kd.kernels.METRICS``, or, for a sparse signal,
                ``SPARSE_METRICS``.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: 0-d loss sum with its graph, and the metrics' sums (0-d, fp32).
        """
        with self.offload_activations:
            hidden = self.decoder(batch.tokens, **batch.attention)
        with phase("loss"):
            weight, bias = output_head(self.decoder)
            if not isinstance(signal, ByRow):
                return self._loss(hidden, weight, bias, batch.labels, signal, metrics)
            parts = []
            for rows, part in zip(signal.rows, signal.signals, strict=True):
                at = list(rows) or [0]  # a teacher without a row has spoken of one without a label
                labels = batch.labels[at] if rows else torch.full_like(batch.labels[at], self.ignore_index)
                parts.append(self._loss(hidden[at], weight, bias, labels, part, metrics))
            losses, sums = zip(*parts, strict=True)
            return torch.stack(losses).sum(), {
                name: torch.stack([each[name] for each in sums]).sum() for name in sums[0]
            }

    def _loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        signal: Hidden | Sparse | None,
        metrics: tuple[str, ...],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and metrics of last hidden states [B, S, D] against one signal."""
        shared = {"student_bias": bias, "reduction": "sum", "return_metrics": metrics}
        if isinstance(signal, Sparse):
            return linear_sparse_kd_objective(
                hidden,
                weight,
                signal.ids,
                signal.log_probs,
                signal.tail,
                labels,
                self._objective,
                tail_at_1=signal.tail_at_1,
                entropy=signal.entropy,
                sampled=signal.sampled,
                **shared,
            )
        if signal is None:
            return linear_kd_objective(hidden, weight, None, None, labels, self._objective, **shared)
        weights, biases = zip(*signal.heads, strict=True)
        if len(weights) == 1:
            return linear_kd_objective(
                hidden, weight, signal.states[0], weights[0], labels, self._objective, teacher_bias=biases[0], **shared
            )
        return linear_kd_objective(
            hidden,
            weight,
            signal.states,
            weights,
            labels,
            self._objective,
            teacher_bias=biases,
            teacher_shares=signal.shares,
            teacher_mix=signal.mix,
            **shared,
        )

    @torch.no_grad()
    def teach(self, tokens: Tensor, **attention: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return last hidden states [B, S, D], weight [V, D] and bias [V] of the head, as a teacher gives them.

        The student is in eval mode meanwhile: no dropout. Under FSDP2 it is a forward of its own.
        """
        was_training = self.training
        self.eval()
        try:
            hidden = self.decoder(tokens, **attention)
            weight, bias = output_head(self.decoder)
        finally:
            self.train(was_training)
        return hidden, weight.detach(), None if bias is None else bias.detach()
