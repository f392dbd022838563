"""The memory of a run per device, put together from a dry step, the optimizer and FSDP2's part."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torchtune.modules.peft import get_adapter_params

from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.plan.communication import Layout, scatter_buffer, sharded_weights
from torchtune_kd.plan.dry_run import WEIGHTS, DryStep, dry_step
from torchtune_kd.plan.meta_models import MetaTeacher, Models, table_bytes, weight_bytes
from torchtune_kd.plan.optimizer_cost import OptimizerCost, optimizer_cost
from torchtune_kd.plan.tracker import tensor_bytes

GIB = 2**30
# What a device's memory cannot be used for: CUDA's context and NCCL's buffers, and what fragmentation leaves over.
CONTEXT_BYTES, USABLE = GIB, 0.9
_AVERAGE_BYTES = 4  # of an averaged weight: fp32


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        teachers (tuple[int, ...]): weights and tables that it keeps of each teacher, NF4 with its scales; of an
            averaged student the averages in fp32.
        student (int): the same of the student, adapters included.
        adapters (int): of the student's.
        gathered (int): whole parameters and gradients in transit that FSDP2 holds beside its shares.
        gradients (int): at the end of the backward pass.
        optimizer (int | None): state; None where it is not known.
        activations (int): what the student's forward leaves for the backward pass, and the teachers' hidden states.
        loss (int): most that the loss holds beside that.
        at_peak (dict[str, int]): what is alive at the highest point, by category; sums to ``total``.
        phases (dict[str, int]): the highest point of each phase of a step.
    """

    teachers: tuple[int, ...]
    student: int
    adapters: int
    gathered: int
    gradients: int
    optimizer: int | None
    activations: int
    loss: int
    at_peak: dict[str, int]
    phases: dict[str, int]

    @property
    def teacher(self) -> int:
        """Return the weights and tables of all teachers."""
        return sum(self.teachers)

    @property
    def total(self) -> int | None:
        """Return the highest point of a step; None where the optimizer's state is not known."""
        return None if self.optimizer is None else max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])


StepFunction = Callable[[Config, Models, int, int, int], DryStep]


def plan_memory(
    config: Config,
    models: Models,
    layout: Layout,
    sequence: int,
    batch_size: int | None = None,
    run: StepFunction = dry_step,
) -> tuple[Memory, DryStep]:
    """Compute the memory of one device, and return it with the dry step that it comes from.

    Args:
        config (Config): the run's.
        models (Models): on the meta device.
        layout (Layout): the run's processes.
        sequence (int): tokens of a sequence.
        batch_size (int | None): sequences of a microbatch; None takes ``settings.batch_size``.
        run (StepFunction): the recipe's step.
    """
    settings = config.settings
    step = run(config, models, batch_size or settings.batch_size, sequence, layout.shards)
    cost = optimizer_cost(config.optimizer, models.trainable[0].dtype, settings.torch_device)
    return _assemble(settings, models, layout, step, cost), step


def _assemble(settings: Settings, models: Models, layout: Layout, step: DryStep, cost: OptimizerCost | None) -> Memory:
    sizes = [-(-parameter.numel() // layout.shards) for parameter in models.trainable]
    teachers = [_teacher_weights(teacher, models, settings, layout, sizes) for teacher in models.teachers]
    student = _weights(models.student, settings, layout)
    whole = dict(zip(WEIGHTS, (sum(each.whole for each in teachers), student.whole), strict=True))
    held = dict(zip(WEIGHTS, (sum(each.held for each in teachers), student.held), strict=True))
    layers = [each.layers for each in teachers] or [0]  # of one teacher at a time, unless they stay
    gathered = max(layers) if settings.fsdp_reshard_after_forward else sum(layers)
    gathered += sum(each.rest for each in teachers) + student.rest + student.layers
    if layout.shards > 1:
        gathered += scatter_buffer(models, settings)
    offloaded = layout.sharded and settings.fsdp_cpu_offload
    state = temporary = 0
    if cost is not None and not offloaded:
        state, temporary = cost.state_bytes(sum(sizes)), cost.temporary_bytes(sum(sizes), max(sizes))
    weights = sum(held.values())
    beside = weights - sum(whole.values()) + gathered + state
    phases = {phase: peak + beside for phase, peak in step.peaks.items()}
    gradients = step.gradients // layout.shards  # after the last microbatch
    if models.own == "ema" and models.trainable[0].dtype != torch.float32:  # it follows what the optimizer has left
        temporary = max(temporary, _AVERAGE_BYTES * max(sizes))
    phases["optimizer"] = weights + (0 if offloaded else gradients + state + temporary)
    highest = max(phases, key=lambda phase: phases[phase])
    if highest == "optimizer":
        at_peak = {"gradients": gradients, "optimizer": state, "temporary": temporary}
    else:
        live = {name: size for name, size in step.at_peaks[highest].items() if name not in whole}
        at_peak = {
            "gathered": gathered,
            "gradients": live.pop("gradients", 0),
            "optimizer": state,
            "activations": live.pop("student", 0) + live.pop("teacher", 0),
            "loss": live.pop("loss", 0),
            "temporary": sum(live.values()),
        }
    return Memory(
        teachers=tuple(each.held for each in teachers),
        student=student.held,
        adapters=sum(map(tensor_bytes, get_adapter_params(models.student).values())) // layout.shards,
        gathered=gathered,
        gradients=step.gradients,
        optimizer=None if cost is None else state,
        activations=step.kept,
        loss=step.loss,
        at_peak={**held, **at_peak},
        phases=phases,
    )


@dataclass(frozen=True)
class _Weights:
    """Bytes of one model: whole, kept on a device, and gathered there as in ``ShardedWeights``."""

    whole: int
    held: int
    rest: int = 0
    layers: int = 0


def _weights(model: nn.Module, settings: Settings, layout: Layout) -> _Weights:
    whole = weight_bytes(model)
    if not layout.sharded:
        return _Weights(whole, whole)
    sharded = sharded_weights(model, settings, layout)
    return _Weights(whole, sharded.share + table_bytes(model), sharded.rest, sharded.layers)


def _teacher_weights(
    teacher: MetaTeacher, models: Models, settings: Settings, layout: Layout, trained: list[int]
) -> _Weights:
    """Return what a teacher takes beside the student; ``trained`` are the elements of this process's parts."""
    if teacher.own == "ema":
        whole = sum(parameter.numel() for parameter in models.trainable)
        return _Weights(_AVERAGE_BYTES * whole, _AVERAGE_BYTES * sum(trained))
    if teacher.model is None:
        return _Weights(0, 0)
    weights, in_8_bits = _weights(teacher.model, settings, layout), sum(map(tensor_bytes, teacher.head_tensors))
    # a head in 8 bits is whole on every process
    return replace(weights, whole=weights.whole + in_8_bits, held=weights.held + in_8_bits)


def fits(total: int, device_memory: int) -> bool:
    """Return whether a run of ``total`` bytes goes into a device of ``device_memory`` bytes."""
    return total + CONTEXT_BYTES <= USABLE * device_memory


def largest_batch(total: Callable[[int], int], device_memory: int, known: dict[int, int], most: int = 1 << 14) -> int:
    """Find the most sequences per microbatch that fit; 0 if not even one does.

    Memory grows nearly in proportion to the batch, so each trial is where the two nearest ones point.

    Args:
        total (Callable[[int], int]): bytes at a batch size.
        device_memory (int): bytes of the device.
        known (dict[int, int]): totals that are known already; grows.
        most (int): where to stop.
    """

    def at(batch: int) -> int:
        if batch not in known:
            known[batch] = total(batch)
        return known[batch]

    low, high = 0, most + 1  # the largest known to fit, the smallest known not to
    guess = max(1, min(known, default=1))
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if fits(at(guess), device_memory):
            low = guess
        else:
            high = guess
        nearest = sorted(known, key=lambda batch: abs(batch - guess))[:2]
        if len(nearest) < 2:
            guess = 2 * guess if low else max(1, guess // 2)
            continue
        first, second = nearest
        slope = max(1.0, (known[first] - known[second]) / (first - second))
        room = USABLE * device_memory - CONTEXT_BYTES - known[first]
        guess = first + math.floor(room / slope)
    return low
