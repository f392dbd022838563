"""One microbatch of the real training step, or of a validation, on the meta device: its memory and its FLOPs.

The models, the step and the loss are those of the recipe. Two things are stood in for: the loss arithmetic on one
chunk of logits, which needs values (``kernels.on_meta`` allocates its workspace as on the device), and the offloading
of activations.

Legend: B sequences, S their length, N = B x S tokens, V vocabulary, D hidden width.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchtune_kd.config.metrics import training_metrics, validation_metrics
from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.world import World
from torchtune_kd.kernels import on_meta
from torchtune_kd.losses import KDLoss
from torchtune_kd.models.student import Student
from torchtune_kd.plan.dry_teachers import deals, dry_teacher
from torchtune_kd.plan.meta_models import Models
from torchtune_kd.plan.tracker import Operation, Tracker
from torchtune_kd.teachers.base import Teacher
from torchtune_kd.training.step import gradient_scale

WEIGHTS = ("teacher weights", "student weights")


@dataclass(frozen=True)
class DryStep:
    """A microbatch on one device that holds everything whole.

    Attributes:
        peaks (dict[str, int]): highest number of bytes by phase, weights and gradients included, optimizer not.
        at_peaks (dict[str, dict[str, int]]): bytes by category where the highest of each phase is reached.
        kept (int): bytes between the student's forward and the loss that are neither weights nor gradients: what
            autograd keeps, all models' last hidden states, and of an averaged student a copy of the head.
        loss (int): most bytes that the loss holds beside what was there before it.
        gradients (int): bytes of the gradients after the backward pass.
        operations (list[Operation]): in order.
        microbatches (int): that the operations are of; above 1 where it depends on the data whose a row is.
    """

    peaks: dict[str, int]
    at_peaks: dict[str, dict[str, int]]
    kept: int
    loss: int
    gradients: int
    operations: list[Operation]
    microbatches: int = 1


def dry_step(config: Config, models: Models, batch_size: int, sequence: int, shards: int = 1) -> DryStep:
    """Run one microbatch, every token valid; of teachers with ``datasets`` several, see :mod:`.dry_teachers`.

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

    def microbatch(dry: _DryRun) -> int:
        with gradients_counted(dry.tracker, models, settings, shards, reduced_at_once=at_once), dry.tracker:
            scale = gradient_scale([dry.batch], dry.kd_loss.ignore_index, World(torch.device("meta")))
            loss, _ = dry.loss(dry.student.train(), training_metrics(config))
            (loss * scale).backward()
            return dry.tracker.live["gradients"]

    return _each_deal(config, models, batch_size, sequence, shards, microbatch)


def dry_validation(config: Config, models: Models, batch_size: int, sequence: int, shards: int = 1) -> DryStep:
    """Run one batch of a validation: as :func:`dry_step`, without gradients."""

    def batch(dry: _DryRun) -> int:
        with torch.no_grad(), dry.tracker:
            dry.loss(dry.student.eval(), validation_metrics(config))
        return 0

    return _each_deal(config, models, batch_size, sequence, shards, batch)


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
            at_peaks=self.tracker.at_peaks,
            kept=self.sizes["kept"],
            loss=self.tracker.peaks["loss"] - self.sizes["before loss"],
            gradients=gradients,
            operations=self.tracker.operations,
        )


def _each_deal(
    config: Config,
    models: Models,
    batch_size: int,
    sequence: int,
    shards: int,
    run: Callable[[_DryRun], int],
) -> DryStep:
    """Run a microbatch for each way to deal its rows to teachers; ``run`` returns the bytes of its gradients."""
    equal, uneven = deals(config, batch_size)
    steps = []
    for parts in (*equal, *uneven):
        with _dry_run(config, models, batch_size, sequence, shards, parts) as dry:
            steps.append(dry.result(run(dry)))
    highest = {phase: max(steps, key=lambda step, phase=phase: step.peaks[phase]) for phase in steps[0].peaks}
    return DryStep(
        peaks={phase: step.peaks[phase] for phase, step in highest.items()},
        at_peaks={phase: step.at_peaks[phase] for phase, step in highest.items()},
        kept=max(step.kept for step in steps),
        loss=max(step.loss for step in steps),
        gradients=max(step.gradients for step in steps),
        operations=[operation for step in steps[: len(equal)] for operation in step.operations],
        microbatches=len(equal),
    )


@contextlib.contextmanager
def _dry_run(
    config: Config, models: Models, batch_size: int, sequence: int, shards: int, parts: Sequence[int]
) -> Iterator[_DryRun]:
    settings, kd_loss = config.settings, config.kd_loss.build()
    student = Student(models.student, kd_loss, settings.kd_ratio)
    teacher = dry_teacher(config, models, kd_loss, student, shards)
    if settings.enable_activation_offloading:
        student.offload_activations = _offloaded()
    tracker = Tracker()
    hold_weights(tracker, models)
    tracker.hold(WEIGHTS[0], (tensor for tensor in teacher.kept_state().values() if tensor.is_meta))
    labels = torch.zeros(batch_size, sequence, dtype=torch.long)  # on the host, as in a run
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, student, "offload_activations", contextlib.nullcontext())
        sizes = stack.enter_context(_phases(tracker, student))
        in_8_bits = functools.partial(tracker.account, float8=True)
        account = functools.partial(tracker.account, 0)
        stack.enter_context(on_meta(settings.torch_device, account=account, account_product=in_8_bits))
        batch = Batch(labels, labels, lengths=[[sequence]] * batch_size, parts=parts)
        yield _DryRun(tracker, student, teacher, kd_loss, batch, sizes)


def hold_weights(tracker: Tracker, models: Models) -> None:
    """Count the weights of all models, and begin with the teachers' forwards."""
    tracker.phase = "teacher" if models.teachers else "student"
    for teacher in models.teachers:
        if teacher.model is not None:
            tracker.hold(WEIGHTS[0], (*teacher.model.parameters(), *teacher.model.buffers(), *teacher.head_tensors))
    tracker.hold(WEIGHTS[1], (*models.student.parameters(), *models.student.buffers()))


@contextlib.contextmanager
def _phases(tracker: Tracker, student: Student) -> Iterator[dict[str, int]]:
    """Set the tracker's phase as the step goes through the modules, and take sizes on the way."""
    sizes: dict[str, int] = {}

    def enter(phase: str) -> Any:
        def hook(*_: Any) -> None:
            tracker.phase = phase

        return hook

    def before_loss(*_: Any) -> None:
        if tracker.phase != "student":  # it teaches itself
            return
        live = tracker.live
        sizes["before loss"] = sum(live.values())
        sizes["kept"] = sizes["before loss"] - live["gradients"] - sum(live[name] for name in WEIGHTS)
        tracker.phase = "loss"

    handles = [
        student.register_forward_pre_hook(enter("student")),
        student.decoder.register_forward_hook(before_loss),
        student.register_forward_hook(enter("backward")),
    ]
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
