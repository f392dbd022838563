"""One microbatch of the real training step, or of a validation, on the meta device: its memory and its FLOPs.

The models, the step and the loss are those of the recipe. Two things are stood in for: the loss arithmetic on one
chunk of logits, which needs values (``kernels.on_meta`` allocates its workspace as on the device), and the offloading
of activations.

Legend: B sequences, S their length, N = B x S tokens, V vocabulary, D hidden width.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.caches.reader import Reading
from torchtune_kd.caches.states import encode
from torchtune_kd.config.metrics import training_metrics, validation_metrics
from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.data.batches import Batch
from torchtune_kd.data.documents import Document
from torchtune_kd.distributed.world import World
from torchtune_kd.kernels import on_meta
from torchtune_kd.losses import KDLoss
from torchtune_kd.losses.signals import Head
from torchtune_kd.models.student import Student
from torchtune_kd.plan.meta_models import Models, StoredTeacher, head_tensors
from torchtune_kd.plan.tracker import Operation, Tracker
from torchtune_kd.teachers.base import NoTeacher, Teacher
from torchtune_kd.teachers.cached import CachedTeacher
from torchtune_kd.teachers.cached_sparse import SparseTeacher
from torchtune_kd.teachers.live import LiveTeacher
from torchtune_kd.training.step import gradient_scale

WEIGHTS = ("teacher weights", "student weights")


@dataclass(frozen=True)
class DryStep:
    """A microbatch on one device that holds everything whole.

    Attributes:
        peaks (dict[str, int]): highest number of bytes by phase, weights and gradients included, optimizer not.
        at_peak (dict[str, int]): bytes by category where the highest of them is reached.
        kept (int): bytes between the student's forward and the loss that are neither weights nor gradients: what
            autograd keeps, and both models' last hidden states.
        loss (int): most bytes that the loss holds beside what was there before it.
        gradients (int): bytes of the gradients after the backward pass.
        operations (list[Operation]): in order.
    """

    peaks: dict[str, int]
    at_peak: dict[str, int]
    kept: int
    loss: int
    gradients: int
    operations: list[Operation]

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase])


def dry_step(config: Config, models: Models, batch_size: int, sequence: int, shards: int = 1) -> DryStep:
    """Run one microbatch, every token valid.

    With ``gradient_accumulation_steps`` above 1 it is the second one: the first one's gradients are there.

    Args:
        config (Config): the run's.
        models (Models): of the same config.
        batch_size (int): B.
        sequence (int): S.
        shards (int): processes that share the weights: FSDP2 leaves each its part of the gradients.
    """
    settings = config.settings
    at_once = settings.gradient_accumulation_steps == 1  # else in the last microbatch
    with _dry_run(config, models, batch_size, sequence) as dry:
        with gradients_counted(dry.tracker, models, settings, shards, reduced_at_once=at_once), dry.tracker:
            scale = gradient_scale([dry.batch], dry.kd_loss.ignore_index, World(torch.device("meta")))
            loss, _ = dry.loss(dry.student.train(), training_metrics(config))
            (loss * scale).backward()
            gradients = dry.tracker.live["gradients"]
        return dry.result(gradients)


def dry_validation(config: Config, models: Models, batch_size: int, sequence: int, shards: int = 1) -> DryStep:
    """Run one batch of a validation: as :func:`dry_step`, without gradients."""
    with _dry_run(config, models, batch_size, sequence) as dry:
        with torch.no_grad(), dry.tracker:
            dry.loss(dry.student.eval(), validation_metrics(config))
        return dry.result(gradients=0)


@dataclass(frozen=True)
class _DryRun:
    tracker: Tracker
    student: Student
    teacher: Teacher
    kd_loss: KDLoss
    batch: Batch
    sizes: dict[str, int]

    def loss(self, student: Student, metrics: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Do what a step does with a microbatch before its backward."""
        self.teacher.expect(self.batch)
        batch = self.batch.to(torch.device("meta"))
        return student(batch, self.teacher.signal(batch), metrics)

    def result(self, gradients: int) -> DryStep:
        return DryStep(
            peaks=self.tracker.peaks,
            at_peak=self.tracker.at_peak,
            kept=self.sizes["kept"],
            loss=self.tracker.peaks["loss"] - self.sizes["before loss"],
            gradients=gradients,
            operations=self.tracker.operations,
        )


@contextlib.contextmanager
def _dry_run(config: Config, models: Models, batch_size: int, sequence: int) -> Iterator[_DryRun]:
    settings, kd_loss = config.settings, config.kd_loss.build()
    student = Student(models.student, kd_loss, settings.kd_ratio)
    teacher = _teacher(config, models, kd_loss)
    if settings.enable_activation_offloading:
        student.offload_activations = _offloaded()
    tracker = Tracker()
    hold_weights(tracker, models)
    labels = torch.zeros(batch_size, sequence, dtype=torch.long)  # on the host, as in a run
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, student, "offload_activations", contextlib.nullcontext())
        sizes = stack.enter_context(_phases(tracker, student, teacher))
        in_8_bits = functools.partial(tracker.account, float8=True)
        account = functools.partial(tracker.account, 0)
        stack.enter_context(on_meta(settings.torch_device, account=account, account_product=in_8_bits))
        yield _DryRun(
            tracker, student, teacher, kd_loss, Batch(labels, labels, lengths=[[sequence]] * batch_size), sizes
        )


def _teacher(config: Config, models: Models, kd_loss: KDLoss) -> Teacher:
    if models.teacher is None:
        return NoTeacher()
    if not isinstance(models.teacher, StoredTeacher):
        return LiveTeacher(models.teacher, models.teacher_head)
    stored, where = models.teacher, {"ignore_index": kd_loss.ignore_index, "device": torch.device("meta")}
    reader, manifest = _DryReader(stored.manifest), stored.manifest
    if stored.manifest.kind != "hidden":
        renormalise = config.teacher_tail is not None
        return SparseTeacher(reader, manifest, kd_loss.temperature, renormalise=renormalise, **where)
    head = models.teacher_head or Head(stored.weight, stored.bias)
    rms = torch.empty(manifest.width, device="meta")
    return CachedTeacher(reader, head, rms, dtype=stored.computed_in, **where)


class _DryReader:
    """Stands for the files of a cache."""

    def __init__(self, manifest: CacheManifest) -> None:
        self._manifest = manifest

    def read(self, documents: Sequence[Document]) -> Reading:
        """Return columns of the right size, without values."""
        manifest, tokens = self._manifest, sum(len(document.positions) for document in documents)
        if manifest.kind == "hidden":
            rms = torch.empty(manifest.width, device="meta")
            return Reading(encode(rms.new_empty(tokens, manifest.width), str(manifest.dtype), rms), [])
        sizes = {
            name: ((tokens,) if width is None else (tokens, width), dtype)
            for name, (dtype, width) in manifest.columns.items()
        }
        return Reading(
            {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}, []
        )

    def close(self) -> None:
        """Read nothing, as before."""


def hold_weights(tracker: Tracker, models: Models) -> None:
    tracker.phase = "teacher" if models.teacher is not None else "student"
    for name, model in zip(WEIGHTS, (models.teacher, models.student), strict=True):
        if model is not None:
            tracker.hold(name, (*model.parameters(), *model.buffers()))
    tracker.hold(WEIGHTS[0], head_tensors(models))


@contextlib.contextmanager
def _phases(tracker: Tracker, student: Student, teacher: Teacher) -> Iterator[dict[str, int]]:
    """Set the tracker's phase as the step goes through the modules, and take sizes on the way."""
    sizes: dict[str, int] = {}

    def enter(phase: str) -> Any:
        def hook(*_: Any) -> None:
            tracker.phase = phase

        return hook

    def before_loss(*_: Any) -> None:
        live = tracker.live
        sizes["before loss"] = sum(live.values())
        sizes["kept"] = sizes["before loss"] - live["gradients"] - sum(live[name] for name in WEIGHTS)
        tracker.phase = "loss"

    handles = [
        student.register_forward_pre_hook(enter("student")),
        student.decoder.register_forward_hook(before_loss),
        student.register_forward_hook(enter("backward")),
    ]
    if isinstance(teacher, LiveTeacher):
        handles.append(teacher.register_forward_pre_hook(enter("teacher")))
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def gradients_counted(
    tracker: Tracker, models: Models, settings: Settings, shards: int, *, reduced_at_once: bool
) -> Iterator[None]:
    """Give the trainable parameters the gradients of earlier microbatches, if any, and follow those of this one.

    Args:
        tracker (Tracker): counts complete gradients under "gradients".
        models (Models): whose student trains; its gradients are removed in the end.
        settings (Settings): with one microbatch per step there are no earlier ones.
        shards (int): P processes that share the weights.
        reduced_at_once (bool): as soon as a layer's gradients are there, 1/P of them is kept; those of embedding,
            norm and head follow at the end of the backward pass.
    """
    in_layers = {id(parameter) for parameter in models.student.layers.parameters()}
    shares: dict[int, Tensor] = {}
    scattered = shards > 1 and reduced_at_once

    def keep_share(parameter: nn.Parameter) -> None:
        if id(parameter) not in shares:
            shares[id(parameter)] = parameter.new_empty(-(-parameter.numel() // shards))
            tracker.hold("gradients", [shares[id(parameter)]])

    def complete(parameter: nn.Parameter) -> None:
        if scattered and id(parameter) in in_layers:
            keep_share(parameter)
            parameter.grad = None
        else:
            tracker.hold("gradients", [parameter.grad])

    if settings.gradient_accumulation_steps > 1:
        for parameter in models.trainable:
            if scattered:
                keep_share(parameter)
            else:
                parameter.grad = torch.empty_like(parameter)
                tracker.hold("gradients", [parameter.grad])
    handles = [parameter.register_post_accumulate_grad_hook(complete) for parameter in models.trainable]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in models.trainable:
            parameter.grad = None


def _offloaded() -> Any:
    """Activations leave the device when autograd saves them and come back when it reads them."""

    def pack(tensor: Tensor) -> Any:
        small = tensor.numel() * tensor.element_size() < 1024  # torchtune's threshold
        if small or not tensor.is_meta or isinstance(tensor, nn.Parameter) or tensor._base is not None:
            return tensor
        return tensor.shape, tensor.stride(), tensor.dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, stride, dtype = packed
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
