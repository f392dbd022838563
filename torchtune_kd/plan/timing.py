"""How long a step may take: a roofline of every operation of the dry step, and what travels beside it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from torchtune_kd.config.settings import Settings
from torchtune_kd.plan.communication import Communication, Layout
from torchtune_kd.plan.devices import Device
from torchtune_kd.plan.meta_models import Models
from torchtune_kd.plan.optimizer_cost import OptimizerCost
from torchtune_kd.plan.tracker import Operation, tensor_bytes

# What of the datasheets' peaks is reached, and what an operation costs at least: typical of eager PyTorch with large
# matrices. They are assumptions, and printed as such.
ACHIEVED_FLOPS, ACHIEVED_BANDWIDTH, ACHIEVED_LINK = 0.6, 0.75, 0.7
SECONDS_PER_OPERATION = 5e-6
# of the time of a product of bf16: 2048 x 4096 x 128256 on an H200 (PyTorch 2.11), 1.77 instead of 2.75 ms
FLOAT8_TIME = 0.6
DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        phases (dict[str, float]): what the device computes, by phase, over all microbatches.
        communication (float): what travels, all of it.
        exposed (float): the part of it that nothing hides.
    """

    phases: dict[str, float]
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return sum(self.phases.values()) + self.exposed


def flops_by_phase(operations: Iterable[Operation], microbatches: int | Fraction) -> dict[str, int]:
    """Count the FLOPs of one optimizer step on one device: a multiplication and an addition are two.

    Args:
        operations (Iterable[Operation]): of a microbatch, or of several.
        microbatches (int | Fraction): how often they are done in a step: of several, part of them.
    """
    counts: Counter[str] = Counter()
    for operation in operations:
        counts[operation.phase] += operation.flops
    return {phase: int(count * microbatches) for phase, count in counts.items()}


def average_traffic(models: Models) -> float:
    """Return the bytes of each trained weight that a step moves to let an average of them follow; 0 without one.

    The average is read and written in fp32 and the weight read; of another dtype it is converted before.
    """
    steps = [each.entry.every_n_steps for each in models.teachers if each.entry is not None and each.own == "ema"]
    size = models.trainable[0].itemsize
    return sum((3 * 4 if size == 4 else size + 4 * 4) / every for every in steps)


def why_times_cannot(settings: Settings) -> str | None:
    """Name what of these settings has no expected time, in a sentence without its end; None where all have one."""
    names = ("fsdp_cpu_offload", "enable_activation_offloading")
    used = [f"`{name}`" for name in names if getattr(settings, name)]
    if not used:
        return None
    return (
        f"with {' and '.join(used)} a step also waits for copies between host and device, and, where the optimizer's "
        "state is in host memory, for the host's cores, which are not modelled"
    )


def step_time(
    operations: Iterable[Operation],
    microbatches: int | Fraction,
    trainable: list[nn.Parameter],
    optimizer: OptimizerCost | None,
    layout: Layout,
    travels: Communication,
    device: Device,
    dtype: str,
    network: float,
    average: float = 0.0,
) -> StepTime:
    """Estimate the time of one optimizer step.

    An operation takes as long as its FLOPs or as the bytes that it reads and writes, whichever is longer. Weights that
    are gathered layer by layer, and gradients, travel behind the computation; embedding, norm and head before it.

    Args:
        operations (Iterable[Operation]): of a microbatch, or of several.
        microbatches (int | Fraction): how often they are done in a step, see :func:`flops_by_phase`.
        trainable (list[nn.Parameter]): what the optimizer updates, whole.
        optimizer (OptimizerCost | None): of its state; without it the state is left out.
        layout (Layout): the processes.
        travels (Communication): bytes per step.
        device (Device): its peaks.
        dtype (str): fp32 or bf16.
        network (float): GB/s in one direction between nodes, per device.
        average (float): bytes of each trained weight that an average of them moves, see :func:`average_traffic`.
    """
    flops, bandwidth = device.tflops[dtype] * 1e12 * ACHIEVED_FLOPS, device.bandwidth * 1e9 * ACHIEVED_BANDWIDTH
    phases: Counter[str] = Counter()
    for phase, count, moved, float8 in operations:
        seconds = count / flops * (_float8_time(device) if float8 else 1.0)
        phases[phase] += float(microbatches) * max(seconds, moved / bandwidth, SECONDS_PER_OPERATION)
    elements = sum(parameter.numel() for parameter in trainable) / layout.shards
    state = 0.0 if optimizer is None else optimizer.state
    # weights, gradients and state are read, weights and state written
    moved = 3 * sum(map(tensor_bytes, trainable)) / layout.shards + (2 * state + average) * elements
    phases["optimizer"] = moved / bandwidth
    if not travels.total:
        return StepTime(dict(phases), 0.0, 0.0)
    within = device.link if layout.shards <= DEVICES_PER_NODE else min(device.link, network)
    across = device.link if layout.processes <= DEVICES_PER_NODE else network
    hidden = travels.teacher_layers + travels.student_layers + travels.gradients
    hidden = hidden / (within * 1e9 * ACHIEVED_LINK) + travels.replicas / (across * 1e9 * ACHIEVED_LINK)
    first = travels.heads / (within * 1e9 * ACHIEVED_LINK)
    computing = sum(phases.values()) - phases["optimizer"]
    return StepTime(dict(phases), hidden + first, first + max(0.0, hidden - computing))


def _float8_time(device: Device) -> float:
    """Return the time of a product of 8-bit floats relative to one of bf16: a device without emulates it in fp32."""
    return FLOAT8_TIME if device.float8 else device.tflops["bf16"] / device.tflops["fp32"]
