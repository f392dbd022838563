"""How often the host waits for the device: in the loss functions, and in a step of a small model.

Legend: N tokens, V vocabulary, D hidden width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..losses._report import markdown_table
from ._counter import WaitCounter, runtime_waits
from ._job import Emit, Job, Row, Skip
from ._recipe import Failed, check_torchtune, measured_steps, our_config, stock_config
from .kernels import backend_of, gradients

TITLE = "Where the host waits"
PARTS = ("losses", "ours", "stock")
SHAPE, SMALL = (1024, 32000, 256, 512), (8, 300, 16, 32)  # N, V, D of student and teacher


def run(job: Job, emit: Emit) -> None:
    """Count in the loss functions, or in a step of one of the recipes; nothing is timed, so these run beside others."""
    if job.part == "losses":
        _count_in_losses(job, emit)
    elif not (job.part == "stock" and job.rehearse):  # that of `steps` is as small in a rehearsal
        row: Row = {"recipe": job.part}
        try:
            check_torchtune()
            emit(row | _steps(job.part, job))
        except Skip as reason:
            emit(row | {"left_out": str(reason)})
        except Failed as error:
            emit(row | {"error": str(error)})


def _count_in_losses(job: Job, emit: Emit) -> None:
    for name, expected, call in loss_calls(job):
        call()  # compiles
        counter = WaitCounter(job.device)
        counter.start()
        try:
            call()
        finally:
            places = counter.stop()
        runtime = runtime_waits(call) if job.device == "cuda" else None
        emit({"loss": name, "expected": expected, "places": places, "runtime": runtime})


def _steps(side: str, job: Job) -> Row:
    folder = Path(job.folder) / side
    if side == "ours":
        cfg, recipe = our_config("lora", folder, job.device, tiny=True), "torchtune_kd/kd_single_device"
    else:
        cfg, recipe = stock_config(folder, job.device, tiny=True), "knowledge_distillation_single_device"
    return {"waits": measured_steps(recipe, cfg, folder, job.seconds)["waits"]}


def loss_calls(job: Job) -> list[tuple[str, int, Callable[[], Any]]]:
    """Return calls, forward and backward, with the waits that the documentation promises for a GPU."""
    from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

    (tokens, vocab, *widths), device = SMALL if job.rehearse else SHAPE, job.device
    settings = {"kd_ratio": 0.5, "temperature": 2.0, "backend": backend_of(job)[0]}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    labels = torch.randint(0, vocab, (tokens,))
    labels[::2] = -100
    there = labels.to(device)
    logits, teacher_logits = normal(tokens, vocab).requires_grad_(), normal(tokens, vocab)
    hidden, teacher_hidden = normal(tokens, widths[0]).requires_grad_(), normal(tokens, widths[1])
    head, teacher_head = normal(vocab, widths[0]) / 16, normal(vocab, widths[1]) / 16

    def softmax(divergence: str, **more: Any) -> Callable[[], Any]:
        def call() -> None:
            result = softmax_kd_loss(logits, teacher_logits, there, divergence=divergence, **settings, **more)
            loss = result[0] if isinstance(result, tuple) else result
            gradients(loss.sum(), logits)

        return call

    def linear(given: Tensor, trained: bool = False, **more: Any) -> Callable[[], Any]:
        weight = head.clone().requires_grad_(trained)

        def call() -> None:
            loss = linear_kd_loss(hidden, weight, teacher_hidden, teacher_head, given, **settings, **more)
            gradients(loss.sum(), hidden, *([weight] if trained else []))

        return call

    return [
        ("softmax_kd_loss, forward KL", 0, softmax("forward_kl")),
        ("softmax_kd_loss, JSD", 0, softmax("jsd")),
        ("softmax_kd_loss, forward KL, all metrics", 0, softmax("forward_kl", return_metrics=True)),
        ("linear_kd_loss, labels on the host", 0, linear(labels)),
        ("linear_kd_loss, labels on the host, trainable head", 0, linear(labels, trained=True)),
        ("linear_kd_loss, labels on the device", 1, linear(there)),
        ("linear_kd_loss, labels on the device, a loss per token", 1, linear(there, reduction="none")),
    ]


def problems(rows: list[Row]) -> list[str]:
    """Return a line for each call that waits more often than it says, on a GPU, and for our recipe if it failed."""
    found = []
    for row in rows:
        if "loss" in row and row["runtime"] is not None and sum(row["places"].values()) > row["expected"]:
            found.append(f"{row['loss']}: {sum(row['places'].values())} waits, {row['expected']} expected")
        if row.get("recipe") == "ours" and "error" in row:
            found.append(f"a step: {row['error']}")
    return found


def render(rows: list[Row], facts: dict[str, Any]) -> str:
    """A table of the loss functions, then the places in a step."""
    cuda = bool(facts.get("name"))
    counted = "PyTorch's count" if cuda else "operations that would wait on a device"
    parts = [
        f"Forward and backward; {counted}"
        + (", and what the CUDA runtime was asked for, libraries included." if cuda else ", on a CPU.")
    ]
    table = [
        (
            row["loss"],
            str(row["expected"]),
            str(sum(row["places"].values())),
            "-" if row["runtime"] is None else str(row["runtime"]),
            ", ".join(row["places"]) or "-",
        )
        for row in rows
        if "loss" in row
    ]
    if table:
        parts.append(markdown_table(("call", "promised", "waits", "runtime", "where"), table))
    for row in rows:
        if "recipe" in row:
            name = "A step of torchtune-kd" if row["recipe"] == "ours" else "A step of torchtune's stock recipe"
            parts.append(f"{name}, two microbatches: {_places(row)}")
    return "\n\n".join(parts)


def _places(row: Row) -> str:
    if "waits" not in row:
        return row.get("error") or f"left out: {row['left_out']}."
    places = max(row["waits"], key=lambda places: sum(places.values()), default={})
    where = ", ".join(f"{place} ({count})" if count > 1 else place for place, count in places.items())
    return f"{sum(places.values())} waits" + (f": {where}." if where else ".")
