"""A run's plan: parameters, memory, FLOPs, communication, largest batch and step time, from its config alone."""

from collections.abc import Iterable
from dataclasses import dataclass

from torchtune_kd.config.checks import check_tokenizer, missing_tokenizer_files
from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.errors import UserError
from torchtune_kd.models.build import check_vocabularies
from torchtune_kd.plan.communication import Communication, Layout, communication
from torchtune_kd.plan.devices import DEVICES, Device
from torchtune_kd.plan.dry_run import DryStep, dry_step
from torchtune_kd.plan.memory import Memory, StepFunction, largest_batch, plan_memory
from torchtune_kd.plan.meta_models import Models, Parameters, as_run, build_models, count_parameters
from torchtune_kd.plan.optimizer_cost import optimizer_cost
from torchtune_kd.plan.request import SEQUENCE, Request
from torchtune_kd.plan.stock import dry_stock_step, why_stock_cannot
from torchtune_kd.plan.timing import StepTime, flops_by_phase, step_time, why_times_cannot


@dataclass(frozen=True)
class RecipePlan:
    """One recipe on this config.

    Attributes:
        memory (Memory): per device.
        flops (dict[str, int]): per optimizer step and device, by phase.
        communication (Communication): per optimizer step and device.
        largest_batch (int | None): ``batch_size`` that fits ``device_memory``, 0 for none; None if it is not given.
        times (dict[str, StepTime]): of one optimizer step, by device; empty where the plan says ``why_no_times``.
    """

    memory: Memory
    flops: dict[str, int]
    communication: Communication
    largest_batch: int | None
    times: dict[str, StepTime]


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        request (Request): what was asked for.
        settings (Settings): the run's plain values.
        layout (Layout): its processes.
        sequence (int): tokens of a sequence.
        divergence (str): of the run's loss.
        teacher_head (str | None): as in the config.
        missing_tokenizer (tuple[str, ...]): files of the tokenizer that are not there, so that it is not checked.
        parameters (Parameters): of both models.
        devices (tuple[Device, ...]): that times are given for.
        why_no_times (str | None): why there are none; ``devices`` is empty then.
        ours (RecipePlan): of this package's recipe.
        stock (RecipePlan | None): of torchtune's recipe.
        why_no_stock (str | None): why there is none.
    """

    request: Request
    settings: Settings
    layout: Layout
    sequence: int
    divergence: str
    teacher_head: str | None
    missing_tokenizer: tuple[str, ...]
    parameters: Parameters
    devices: tuple[Device, ...]
    why_no_times: str | None
    ours: RecipePlan
    stock: RecipePlan | None
    why_no_stock: str | None

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of all processes and microbatches."""
        settings = self.settings
        return self.layout.processes * settings.gradient_accumulation_steps * settings.batch_size * self.sequence


def plan_run(request: Request, config: Config, layout: Layout) -> RunPlan:
    """Work out what can be said of a run before it starts, without weights and without a GPU.

    Args:
        request (Request): what is asked for, as :func:`read_request` returns it, with the next two.
        config (Config): the run's.
        layout (Layout): its processes.

    Raises:
        UserError: if the config, a device or a size cannot be read, a model cannot be built, or the tokenizer, where
            its files are there, does not fit the models.
    """
    settings, memory = config.settings, request.memory_bytes
    why_no_times = why_times_cannot(settings)
    devices = _devices(request, settings, layout) if why_no_times is None else ()
    models = build_models(config, layout.shards)
    missing = missing_tokenizer_files(config.tokenizer)
    if not missing:
        check_tokenizer(config.tokenizer.build(), check_vocabularies(models.student, models.teacher))
    sequence = _sequence(request, config, models)

    def of_recipe(step: StepFunction, models: Models) -> RecipePlan:
        return _of_recipe(config, models, layout, sequence, memory, devices, request.network_bandwidth, step)

    why = why_stock_cannot(settings, models)
    return RunPlan(
        request=request,
        settings=settings,
        layout=layout,
        sequence=sequence,
        divergence=config.kd_loss.build().divergence,
        teacher_head=config.teacher_head if settings.uses_teacher else None,
        missing_tokenizer=tuple(map(str, missing)),
        parameters=count_parameters(models),
        devices=devices,
        why_no_times=why_no_times,
        ours=of_recipe(dry_step, as_run(config, models)),
        stock=None if why else of_recipe(dry_stock_step, models),
        why_no_stock=why,
    )


def _of_recipe(
    config: Config,
    models: Models,
    layout: Layout,
    sequence: int,
    device_memory: int | None,
    devices: Iterable[Device],
    network: float,
    step: StepFunction,
) -> RecipePlan:
    def at(batch_size: int) -> tuple[Memory, DryStep]:
        return plan_memory(config, models, layout, sequence, batch_size, run=step)

    settings = config.settings
    memory, dry = at(settings.batch_size)
    travels = communication(models, settings, layout, stock=step is dry_stock_step)
    cost = optimizer_cost(config.optimizer, models.trainable[0].dtype, settings.torch_device)
    steps = settings.gradient_accumulation_steps
    most = None
    if device_memory is not None and memory.total is not None:
        known = {settings.batch_size: memory.total}
        most = largest_batch(lambda batch_size: at(batch_size)[0].total, device_memory, known)
    times = {
        device.name: step_time(
            dry.operations, steps, models.trainable, cost, layout, travels, device, settings.dtype, network
        )
        for device in devices
    }
    return RecipePlan(memory, flops_by_phase(dry.operations, steps), travels, most, times)


def _sequence(request: Request, config: Config, models: Models) -> int:
    longest = min(model.max_seq_len for model in (models.student, models.teacher) if model is not None)
    if request.sequence_length is None:
        return min(config.tokenizer.get("max_seq_len") or SEQUENCE, longest)
    if request.sequence_length > longest:
        raise UserError(
            f"Expected sequences of at most {longest} tokens, the most that teacher and student take, got "
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
