"""FSDP2's part: what one process holds of the weights, what it gathers, and what travels in a step.

Legend: P processes that share one copy of the weights (``shards``), R such copies (``replicas``).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torchtune import training

from torchtune_kd.config.settings import Settings
from torchtune_kd.plan.meta_models import Models
from torchtune_kd.plan.tracker import tensor_bytes


@dataclass(frozen=True)
class Layout:
    """Describe how the processes of a run are laid out; P x R of them."""

    shards: int = 1
    replicas: int = 1
    sharded: bool = False

    @property
    def processes(self) -> int:
        return self.shards * self.replicas


@dataclass(frozen=True)
class Groups:
    """Bytes of the parameters that are gathered together: each layer, and the rest (embedding, norm, head)."""

    layers: list[int]
    rest: int

    @property
    def all(self) -> int:
        return sum(self.layers) + self.rest


def parameter_groups(model: nn.Module, settings: Settings, only: Callable[[Tensor], bool] = lambda _: True) -> Groups:
    """Return the groups of a decoder as ``distributed/sharding.py`` makes them.

    Args:
        model (nn.Module): the decoder.
        settings (Settings): for ``custom_sharded_layers``.
        only (Callable[[Tensor], bool]): which parameters to count.
    """
    names = settings.custom_sharded_layers
    units = [m for n, m in model.named_modules() if training.get_shard_conditions(n, m, names_to_match=names)]
    in_units = {id(p) for unit in units for p in unit.parameters()}
    rest = sum(tensor_bytes(p) for p in model.parameters() if id(p) not in in_units and only(p))
    return Groups([sum(tensor_bytes(p) for p in unit.parameters() if only(p)) for unit in units], rest)


@dataclass(frozen=True)
class ShardedWeights:
    """Bytes of one model's weights on one process.

    Attributes:
        share (int): its part, kept all the time; 0 with ``fsdp_cpu_offload``.
        rest (int): whole embedding, norm and head, which are gathered during the whole step.
        layers (int): whole layers at the highest point: two (one at work, one on its way), and with
            ``fsdp_reshard_after_forward: False`` all.
    """

    share: int
    rest: int
    layers: int


def sharded_weights(model: nn.Module, settings: Settings, layout: Layout) -> ShardedWeights:
    groups = parameter_groups(model, settings)
    share = 0 if settings.fsdp_cpu_offload else groups.all // layout.shards
    if layout.shards == 1:  # nothing is copied: a gathered parameter is the share
        return ShardedWeights(share, 0, 0)
    at_once = sorted(groups.layers, reverse=True)[:2] if settings.fsdp_reshard_after_forward else groups.layers
    return ShardedWeights(share, groups.rest, sum(at_once))


def scatter_buffer(models: Models, settings: Settings) -> int:
    """Return the bytes of the largest layer's gradients, which are copied to be summed over processes."""
    return max(parameter_groups(models.student, settings, lambda p: p.requires_grad).layers, default=0)


@dataclass(frozen=True)
class Communication:
    """Bytes that one process receives in one optimizer step (a ring moves (P-1)/P of what is gathered).

    Attributes:
        teacher_layers (int): gathered for the teachers' forward passes, hidden behind them; the student's where it
            teaches itself.
        student_layers (int): gathered for the student's forward and backward passes, hidden behind them.
        heads (int): all models' embedding, norm and head, gathered before anything can start. An averaged student
            gives its own back after it has taught.
        gradients (int): summed over the P processes that share weights, in the last backward pass.
        replicas (int): gradients summed over the R copies, across nodes.
    """

    teacher_layers: int
    student_layers: int
    heads: int
    gradients: int
    replicas: int

    @property
    def total(self) -> int:
        return self.teacher_layers + self.student_layers + self.heads + self.gradients + self.replicas


def communication(models: Models, settings: Settings, layout: Layout) -> Communication:
    """Count what travels in one step.

    Args:
        models (Models): of the run.
        settings (Settings): its plain values.
        layout (Layout): its processes.
    """
    ring = (layout.shards - 1) / layout.shards
    across = 2 * (layout.replicas - 1) / layout.replicas / layout.shards  # an all-reduce of each process's share
    steps = settings.gradient_accumulation_steps
    student = parameter_groups(models.student, settings)
    gradients = parameter_groups(models.student, settings, lambda p: p.requires_grad).all
    teachers = [parameter_groups(each.model, settings) for each in models.teachers if each.model is not None]
    reshards, averaged = settings.fsdp_reshard_after_forward, models.own == "ema"
    teacher_layers = sum(sum(groups.layers) for groups in teachers) * (steps if reshards else 1)
    if averaged or (models.own == "base" and reshards):  # else they stay gathered for the student's forward
        teacher_layers += sum(student.layers) * steps
    student_passes = 2 * steps if reshards else steps if averaged else 1
    return Communication(
        teacher_layers=round(ring * teacher_layers),
        student_layers=round(ring * sum(student.layers) * student_passes),
        heads=round(ring * (student.rest * (2 * steps if averaged else 1) + sum(groups.rest for groups in teachers))),
        gradients=round(ring * gradients),
        replicas=round(across * gradients),
    )
