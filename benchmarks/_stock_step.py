"""torchtune 0.6.1's own KD recipe on the same models, on the meta device.

The student runs before the teacher, so its activations are held meanwhile; both models' logits of all tokens exist in
full, as a list of chunks; autograd keeps the losses' fp32 intermediates of every chunk. It reads
``enable_activation_offloading`` and does nothing with it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torchtune.modules import TransformerDecoder
from torchtune.modules import loss as stock_losses

from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.models.output_head import output_head
from torchtune_kd.plan.communication import Communication, Layout, communication
from torchtune_kd.plan.dry_run import WEIGHTS, DryStep, gradients_counted, hold_weights
from torchtune_kd.plan.meta_models import Models
from torchtune_kd.plan.tracker import Tracker

STOCK_LOSSES = {
    "forward_kl": stock_losses.ForwardKLWithChunkedOutputLoss,
    "reverse_kl": stock_losses.ReverseKLWithChunkedOutputLoss,
    "symmetric_kl": stock_losses.SymmetricKLWithChunkedOutputLoss,
}
_CHUNKS = 8  # its default, and that of its configs


def why_stock_cannot(models: Models) -> str | None:
    """Say in a few words what keeps the stock recipe from running this config; None if nothing does."""
    if len(models.teachers) != 1 or not isinstance(models.teachers[0].model, TransformerDecoder):
        return "it always runs a teacher, and one alone"
    sizes = [output_head(model)[0].shape[0] for model in (models.student, models.teachers[0].model)]
    return None if sizes[0] == sizes[1] else f"its losses fail where heads differ ({sizes[0]} and {sizes[1]} ids)"


def dry_stock_step(config: Config, models: Models, batch_size: int, sequence: int, shards: int = 1) -> DryStep:
    """As :func:`~torchtune_kd.plan.dry_run.dry_step`, for the stock recipe's ``_loss_step``.

    Its chunked losses are taken as in its configs: the divergence of the same name, or forward KL where it has none.
    """
    settings, divergence = config.settings, config.kd_loss.build().divergence
    class_loss = stock_losses.CEWithChunkedOutputLoss(_CHUNKS)
    kd_loss = STOCK_LOSSES.get(divergence, STOCK_LOSSES["forward_kl"])(num_output_chunks=_CHUNKS)
    tracker = _Tracker()
    hold_weights(tracker, models)
    tokens = torch.zeros(batch_size, sequence, dtype=torch.long, device="meta")
    tracker.hold("student", [tokens])
    counted = gradients_counted(tracker, models, settings, shards, reduced_at_once=True)
    with _whole_output(models), counted, tracker:
        tracker.phase = "student"
        logits = models.student.train()(tokens)
        tracker.phase = "teacher"
        with torch.no_grad():
            teacher_logits = models.teachers[0].model.eval()(tokens)
        before_loss = sum(tracker.live.values())
        kept = before_loss - tracker.live["gradients"] - sum(tracker.live[name] for name in WEIGHTS)
        tracker.phase = "loss"
        total = settings.kd_ratio * kd_loss(logits, teacher_logits, tokens)
        total = total + (1 - settings.kd_ratio) * class_loss(logits, tokens)
        del logits, teacher_logits
        tracker.phase = "backward"
        total.backward()
        gradients = tracker.live["gradients"]
    return DryStep(
        peaks=tracker.peaks,
        at_peaks=tracker.at_peaks,
        kept=kept,
        loss=tracker.peaks["loss"] - before_loss,
        gradients=gradients,
        operations=tracker.operations,
    )


def stock_communication(models: Models, settings: Settings, layout: Layout) -> Communication:
    """Count what travels in a step of the stock recipe: it reduces gradients and gathers the heads every microbatch."""
    once, steps = communication(models, settings, layout), settings.gradient_accumulation_steps
    layers = 1 if settings.fsdp_reshard_after_forward else steps  # ours gathers them every microbatch as well
    return Communication(
        teacher_layers=once.teacher_layers * layers,
        student_layers=once.student_layers * layers,
        heads=once.heads * steps,
        gradients=once.gradients * steps,
        replicas=once.replicas * steps,
    )


class _Tracker(Tracker):
    """Answers the only question that the stock losses ask of a value: whether no token is valid. No."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def _whole_output(models: Models) -> Iterator[None]:
    """Decoders that give chunks of logits, as torchtune's are, where ours leave out the head."""
    decoders = [models.student, *(teacher.model for teacher in models.teachers)]
    shortened = [vars(decoder).pop("unembed", None) for decoder in decoders]
    for decoder in decoders:
        decoder.set_num_output_chunks(_CHUNKS)
    try:
        yield
    finally:
        for decoder, unembed in zip(decoders, shortened, strict=True):
            decoder.set_num_output_chunks(0)
            if unembed is not None:
                decoder.unembed = unembed
