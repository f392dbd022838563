"""Where the time of one of our steps goes: what both recipes share, what the loss adds, and what nothing can avoid."""

import time
from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

import torchtune_kd.training as kd
from torchtune_kd.config.metrics import training_metrics
from torchtune_kd.kernels import linear_kd_loss
from torchtune_kd.models.output_head import output_head

from ._device import matrix_rate

ROUNDS = 3


def print_parts(cfg: DictConfig) -> dict[str, float]:
    """Print and return the seconds (best of three) of the parts of a step of the run that ``cfg`` describes.

    ``flops`` are those of the matrix products (attention's are not counted) that both recipes need, ``rate`` is the
    most of them per second that a product alone reaches here: no step can be shorter than their quotient.
    """
    config = kd.read_config(cfg, distributed=False)
    settings = config.settings
    run = kd.set_up(config, kd.World(settings.torch_device))
    batch = next(iter(run.loader))
    tokens, labels, decoder = batch.tokens, batch.labels, run.student.decoder
    teacher = run.teacher.teacher
    with torch.no_grad():
        hidden, teacher_hidden = decoder(tokens), teacher(tokens)
    weight, teacher_weight = output_head(decoder)[0].detach(), teacher.signal(batch).heads[0].weight
    student_rows, teacher_rows = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
    logits = student_rows @ weight.t()

    def bodies() -> None:
        teacher(tokens)
        decoder(tokens).backward(torch.ones_like(hidden))

    def products() -> None:
        torch.mm(student_rows, weight.t(), out=logits)
        torch.mm(teacher_rows, teacher_weight.t(), out=logits)
        torch.mm(logits, weight)

    def loss(metrics: tuple[str, ...]) -> None:
        leaf = hidden.detach().requires_grad_()
        arguments = (leaf, weight, teacher_hidden, teacher_weight, labels)
        linear_kd_loss(*arguments, kd_ratio=settings.kd_ratio, return_metrics=metrics)[0].backward()

    print("\nSeconds of one of our steps (best of three):")
    parts = {}
    for key, name, part in (
        ("bodies", "teacher forward, student forward and backward, without heads (both recipes)", bodies),
        ("products", "the three matrix products between hidden states and logits", products),
        ("loss", "linear_kd_loss with these products", lambda: loss(())),
        (
            "loss_and_metrics",
            "linear_kd_loss with these products and all logged metrics",
            lambda: loss(training_metrics(config)),
        ),
    ):
        parts[key] = _best(part)
        print(f"{parts[key]:8.2f}  {name}", flush=True)
    with FlopCounterMode(display=False) as counter:
        bodies()
        products()
    parts |= {"flops": product_flops(counter), "rate": matrix_rate(tokens.device.type)}
    print(
        f"{parts['flops'] / parts['rate']:8.2f}  at the least for the matrix products of both recipes: "
        f"{parts['flops'] / 1e9:.0f} GFLOP, at {parts['rate'] / 1e9:.0f} GFLOP/s, the best of a product alone"
    )
    run.log.close()
    return parts


def product_flops(counter: FlopCounterMode) -> int:
    """Count those of matrix products; newer PyTorch also counts a CPU's attention."""
    aten = torch.ops.aten
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(product, 0) for product in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm))


def _best(part: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        part()
        times.append(time.perf_counter() - start)
    return min(times)
