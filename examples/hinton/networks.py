"""Small networks trained side by side as one batched network, which takes little longer than one of them.

Legend: M networks, N images of each network's training set, B images of a batch, D pixels, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchtune_kd.kernels import softmax_kd_loss

from .digits import shift_at_random

# Chosen for the error of teachers and of students with hard labels, on other splits than those of the experiments.
BATCH = 100
LEARNING_RATE = 3e-3
STEPS = 3000


class Networks(nn.Module):
    """M multilayer perceptrons of the same widths, each with weights of its own.

    Args:
        count (int): M.
        widths (Sequence[int]): D, the hidden widths, C.
        dropout (float): share of hidden units that training leaves out.
    """

    def __init__(self, count: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            bound = fan_in**-0.5  # as nn.Linear begins
            self.weights.append(nn.Parameter(torch.empty(count, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(count, 1, fan_out).uniform_(-bound, bound)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[M, B, C]`` of images ``[M, B, D]``."""
        x = images
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < len(self.weights) - 1:
                x = self.dropout(x.relu())
        return x

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return logits without dropout."""
        self.eval()
        return self(images)


@dataclass(frozen=True)
class Targets:
    """Train networks on images: on hard labels, or soft targets where there is a teacher.

    Attributes:
        labels (Tensor): ``[M, N]``.
        teacher (Tensor | None): logits ``[M, N, C]``.
        temperature (float): of both softmaxes.
    """

    labels: Tensor
    teacher: Tensor | None = None
    temperature: float = 1.0

    def loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the sum over networks of each one's mean loss, so that each is trained as if it were alone.

        Args:
            logits (Tensor): ``[M, B, C]``.
            rows (Tensor): ``[M, B]``, which of the N images these are.
        """
        return softmax_kd_loss(
            logits,
            None if self.teacher is None else pick(self.teacher, rows),
            self.labels.gather(1, rows),
            divergence="forward_kl",
            temperature=self.temperature,
            kd_ratio=0.0 if self.teacher is None else 1.0,
            reduction="sum",
            scale=1 / rows.shape[1],
        )


def train(
    networks: Networks,
    images: Tensor,
    targets: Targets,
    share: Tensor,
    steps: int = STEPS,
    shifted: bool = False,
    watch: Callable[[Networks, int], None] | None = None,
) -> Networks:
    """Train all networks with Adam, whose rate falls linearly to 0.

    Args:
        networks (Networks): M of them.
        images (Tensor): ``[M, N, D]``.
        targets (Targets): what to learn from them.
        share (Tensor): ``[M, N]``, how often each image is drawn, relative to the others; 0 leaves it out.
        steps (int): batches.
        shifted (bool): shift each drawn image by up to one pixel.
        watch (Callable[[Networks, int], None] | None): called after every step.
    """
    optimizer = torch.optim.Adam(networks.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        networks.train()
        rows = torch.multinomial(share, BATCH, replacement=True)
        batch = pick(images, rows)
        loss = targets.loss(networks(shift_at_random(batch) if shifted else batch), rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if watch:
            watch(networks, step)
    return networks


def pick(values: Tensor, rows: Tensor) -> Tensor:
    """Return rows ``[M, B]`` of values ``[M, N, X]``, as ``[M, B, X]``."""
    return values.gather(1, rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def error(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the percentage of images that each network gets wrong, ``[M]``, of its scores ``[M, N, C]``."""
    return 100 * (scores.argmax(-1) != labels).double().mean(-1)
