"""A run's plan: parameters, memory, FLOPs, communication, largest batch and step time, from its config alone."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from torchtune_kd.config.checks import check_tokenizer, missing_tokenizer_files
from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.errors import UserError
from torchtune_kd.plan.communication import Communication, Layout, communication
from torchtune_kd.plan.devices import DEVICES, Device
from torchtune_kd.plan.dry_run import dry_step
from torchtune_kd.plan.each_teacher import TeacherPlan, each_teacher
from torchtune_kd.plan.memory import Memory, StepFunction, largest_batch, plan_memory
from torchtune_kd.plan.meta_models import (
    Models,
    Parameters,
    as_run,
    build_models,
    count_parameters,
    teacher_parameters,
)
from torchtune_kd.plan.optimizer_cost import optimizer_cost
from torchtune_kd.plan.request import SEQUENCE, Request
from torchtune_kd.plan.timing import StepTime, average_traffic, flops_by_phase, step_time, why_times_cannot
from torchtune_kd.teachers.cached_sparse import check_sparse_cache
from torchtune_kd.training.teachers import with_signal


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run; figures are per device, and of FLOPs, communication and times per optimizer step.

    Attributes:
        request (Request): what was asked for.
        settings (Settings): the run's plain values.
        layout (Layout): its processes.
        sequence (int): tokens of a sequence.
        teachers (tuple[TeacherPlan, ...]): each of them; none at ``kd_ratio: 0``.
        ensemble (str | None): how they are mixed, "probabilities" or "logits"; None of one, and of teachers with
            ``datasets``.
        missing_tokenizer (tuple[str, ...]): files of the tokenizer that are not there, so that it is not checked.
        parameters (Parameters): of all models.
        memory (Memory): of a device.
        flops (dict[str, int]): by phase.
        communication (Communication): what travels.
        largest_batch (int | None): ``batch_size`` that fits ``device_memory``, 0 for none; None if it is not given.
        devices (tuple[Device, ...]): that times are given for.
        times (dict[str, StepTime]): by device.
        why_no_times (str | None): why there are none; ``devices`` and ``times`` are empty then.
    """

    request: Request
    settings: Settings
    layout: Layout
    sequence: int
    teachers: tuple[TeacherPlan, ...]
    ensemble: str | None
    missing_tokenizer: tuple[str, ...]
    parameters: Parameters
    memory: Memory
    flops: dict[str, int]
    communication: Communication
    largest_batch: int | None
    devices: tuple[Device, ...]
    times: dict[str, StepTime]
    why_no_times: str | None

    @property
    def stored_bytes(self) -> int | None:
        """Return the bytes of a token that are read from caches, rows in equal shares; None where all teachers run."""
        sizes = [each.cache_bytes_per_token for each in self.teachers]
        stored = [size for size in sizes if size is not None]
        if not stored:
            return None
        return round(sum(stored) / len(sizes)) if self.teachers[0].datasets else sum(stored)

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of all processes and microbatches."""
        settings = self.settings
        return self.layout.processes * settings.gradient_accumulation_steps * settings.batch_size * self.sequence


def plan_run(
    request: Request,
    config: Config,
    layout: Layout,
    step: StepFunction = dry_step,
    travels: Callable[[Models, Settings, Layout], Communication] = communication,
) -> RunPlan:
    """Work out what can be said of a run before it starts, without weights and without a GPU.

    Args:
        request (Request): what is asked for, as :func:`read_request` returns it, with the next two.
        config (Config): the run's.
        layout (Layout): its processes.
        step (StepFunction): a microbatch of the recipe's step.
        travels (Callable): what the recipe's step sends between devices.

    Raises:
        UserError: if the config, a device or a size cannot be read, a model cannot be built, a teacher cannot teach as
            the config says, or the tokenizer, where its files are there, does not fit the models.
    """
    settings, room = config.settings, request.memory_bytes
    why_no_times = why_times_cannot(settings)
    devices = _devices(request, settings, layout) if why_no_times is None else ()
    models = build_models(config, layout.shards)
    for each, manifest in models.caches:
        check_sparse_cache(each, manifest)
    config = with_signal(config, models.caches)
    missing = missing_tokenizer_files(config.tokenizer)
    if not missing:
        check_tokenizer(config.tokenizer.build(), models.shared_ids())
    sequence, parameters = _sequence(request, config, models), count_parameters(models)
    of_teachers = teacher_parameters(models)
    models = as_run(models)
    memory, dry = plan_memory(config, models, layout, sequence, run=step)
    most = None
    if room is not None and memory.total is not None:

        def total(batch_size: int) -> int:
            return plan_memory(config, models, layout, sequence, batch_size, run=step)[0].total

        most = largest_batch(total, room, {settings.batch_size: memory.total})
    moved = travels(models, settings, layout)
    cost = optimizer_cost(config.optimizer, models.trainable[0].dtype, settings.torch_device)
    steps, network = Fraction(settings.gradient_accumulation_steps, dry.microbatches), request.network_bandwidth
    average = average_traffic(models)
    times = {
        device.name: step_time(
            dry.operations, steps, models.trainable, cost, layout, moved, device, settings.dtype, network, average
        )
        for device in devices
    }
    return RunPlan(
        request=request,
        settings=settings,
        layout=layout,
        sequence=sequence,
        teachers=each_teacher(models, of_teachers, memory.teachers),
        ensemble=config.ensemble if len(models.teachers) > 1 and not config.teachers[0].datasets else None,
        missing_tokenizer=tuple(map(str, missing)),
        parameters=parameters,
        memory=memory,
        flops=flops_by_phase(dry.operations, steps),
        communication=moved,
        largest_batch=most,
        devices=devices,
        times=times,
        why_no_times=why_no_times,
    )


def _sequence(request: Request, config: Config, models: Models) -> int:
    longest = min(model.max_seq_len for model in (models.student, *(teacher.model for teacher in models.others)))
    if request.sequence_length is None:
        return min(config.tokenizer.get("max_seq_len") or SEQUENCE, longest)
    if request.sequence_length > longest:
        raise UserError(
            f"Expected sequences of at most {longest} tokens, the most that teachers and student take, got "
            f"{request.sequence_length}: lower `sequence_length`."
        )
    return request.sequence_length


def _devices(request: Request, settings: Settings, layout: Layout) -> tuple[Device, ...]:
    chosen = request.chosen_device(settings.dtype)
    if chosen is None:
        return DEVICES if settings.torch_device.type == "cuda" else ()
    if not chosen.link and layout.processes > 1:
        raise UserError("Expected `link_bandwidth` (GB/s in one direction between two devices) for several: add it.")
    return (chosen,)
