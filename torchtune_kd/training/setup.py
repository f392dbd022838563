"""Check a run, then build everything that it needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torchtune import training
from torchtune.modules.peft import get_adapter_params

from torchtune_kd.checkpoints import folders
from torchtune_kd.checkpoints.folders import check_output_folder, check_shared_folder, output_folder, run_folders
from torchtune_kd.checkpoints.identity import run_identity
from torchtune_kd.checkpoints.progress import Progress
from torchtune_kd.checkpoints.resume import (
    FoundCheckpoint,
    check_same_run,
    find_checkpoint,
    restore_state,
    restore_teacher,
)
from torchtune_kd.checkpoints.saver import Saver
from torchtune_kd.config.checks import check_checkpoint_files, check_tokenizer
from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.data.steps import build_loaders, steps_per_epoch
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, say
from torchtune_kd.models.build import build_student, check_sharded_layers, on_meta
from torchtune_kd.models.loading import load_weights
from torchtune_kd.teachers.timed import TimedTeacher
from torchtune_kd.training.events import Events
from torchtune_kd.training.log import TrainingLog
from torchtune_kd.training.optim import build_lr_scheduler, build_profiler, check_optimizer
from torchtune_kd.training.run import Run, steps_left_in_epoch
from torchtune_kd.training.teachers import (
    Source,
    build_sources,
    check_data,
    check_teachers,
    joined,
    sources_of,
    teachers_identity,
    with_signal,
)
from torchtune_kd.training.time_limit import TimeLimit


class DataLimits(NamedTuple):
    """Bound what the data may hold, so that teacher and student can both read it."""

    max_seq_len: int  # tokens of the longest sequence
    vocab: int  # ids from 0 to vocab - 1


def check_run(
    config: Config, tokenizer: Any, world: World, sources: Sequence[Source], *, resumed: bool = False
) -> DataLimits:
    """Check everything that needs neither weights nor data, and return what the data may hold.

    Args:
        config (Config): the run's.
        tokenizer (Any): built from it.
        world (World): the processes.
        sources (Sequence[Source]): its teachers that are not the student.
        resumed (bool): whether the output folder holds the checkpoint with which the run goes on.

    Raises:
        UserError: at the first thing that cannot work.
    """
    if not resumed:
        check_output_folder(config)
    check_optimizer(config, world.device)
    check_checkpoint_files(config.checkpointer)
    settings = config.settings
    student = on_meta(config.model, settings, world)
    if settings.save_adapter_weights_only and not get_adapter_params(student):
        raise UserError(
            "`save_adapter_weights_only: True` needs a student with adapters, but `model` is a full-weight one: "
            "set it to False."
        )
    vocab, longest = check_teachers(config, sources, student, world)
    check_tokenizer(tokenizer, vocab)
    if settings.custom_sharded_layers:
        check_sharded_layers(student, settings.custom_sharded_layers)
    return DataLimits(longest, vocab)


# The first step also opens connections and compiles kernels: it may take so many times as long as another.
FIRST_STEP = 5


def set_up(config: Config, world: World) -> Run:
    """Check everything that can be checked without weights, then build data, models and optimizer, or load them.

    Raises:
        UserError: for whatever in config, files or data cannot work.
    """
    began = TimeLimit.clock()
    settings, output = config.settings, output_folder(config)
    check_shared_folder(output, settings, world)
    found = find_checkpoint(output, settings, world)
    progress = Progress() if found is None else Progress(**found.manifest.progress)
    seed = settings.seed if settings.seed is not None or found is None else found.manifest.seed
    seed = training.set_seed(seed, debug_mode=settings.cudnn_deterministic_mode)
    kd_loss = config.kd_loss.build()
    tokenizer = config.tokenizer.build()
    sources = sources_of(config, world)
    config = with_signal(config, [(each, cache.manifest) for each, cache, _ in sources if cache is not None])
    limits = check_run(config, tokenizer, world, sources, resumed=found is not None)
    loader, val_loader = build_loaders(
        config, tokenizer, kd_loss.ignore_index, limits.max_seq_len, limits.vocab, seed, world
    )
    loaders = {"dataset": loader, "dataset_val": val_loader}
    datasets = [(name, each.sampler.dataset) for name, each in loaders.items() if each is not None]
    check_data(sources, datasets, world)
    sequences = settings.batch_size * settings.gradient_accumulation_steps * world.size
    traits = (
        run_identity(
            config,
            loader.sampler.dataset,
            seed=seed,
            sequences_per_step=sequences,
            teacher=teachers_identity(config, sources),
        )
        if world.is_rank_zero
        else {}
    )
    new_schedule = found is not None and check_same_run(found, traits, settings, world)

    epoch_steps = steps_per_epoch(loader, settings.gradient_accumulation_steps, settings.max_steps_per_epoch)
    total_steps = settings.epochs * epoch_steps
    if found is not None:
        loader.sampler.load_state_dict({"epoch": progress.epoch, "position": progress.samples})
        total_steps = progress.global_step + steps_left_in_epoch(loader, settings, progress)
        total_steps += max(settings.epochs - progress.epoch - 1, 0) * epoch_steps
        _look_for_the_end(found, progress, settings, output, total_steps, world)
    elif world.is_rank_zero:
        folders.clean_up(output)
    scheduled_steps, time_limit = total_steps, None
    if settings.max_minutes is not None:
        time_limit = TimeLimit(60 * settings.max_minutes, began, progress.seconds)
        if progress.seconds >= time_limit.seconds:  # all that is left of the run is its export
            total_steps = progress.global_step
    previous_run = run_folders(output) if found is None else []
    log_file = None if found is None else found.manifest.log_file
    log = TrainingLog(config, world, total_steps, progress, log_file)
    written, events = None if found is None else progress, Events()
    saver = Saver(
        config,
        world,
        say=log.say,
        announce=events.announce,
        log_file=log.file(),
        output=output,
        previous_run=previous_run,
        seed=seed,
        identity=traits,
        written=written,
    )

    others = build_sources(sources, kd_loss, world)
    checkpointer, weights = load_weights(config.checkpointer, world)
    student = build_student(config.model, settings, world, kd_loss, weights, seed)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = config.optimizer.build(trainable)
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, scheduled_steps)
    profiler = build_profiler(config.profiler, world.device)
    if found is not None:
        restore_state(found, student, optimizer, lr_scheduler, world, new_schedule=new_schedule)
    teacher = joined(config, others, student)
    if found is not None:
        restore_teacher(found, teacher.kept_state(), world)
    if settings.uses_teacher:
        teacher = log.teacher = TimedTeacher(teacher, world.device)
    if not settings.compile:
        world.barrier()
        world.set_timeout(FIRST_STEP * settings.process_group_timeout)
    return Run(
        config=config,
        world=world,
        ignore_index=kd_loss.ignore_index,
        loader=loader,
        val_loader=val_loader,
        total_steps=total_steps,
        teacher=teacher,
        student=student,
        trainable=trainable,
        checkpointer=checkpointer,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        profiler=profiler,
        log=log,
        saver=saver,
        events=events,
        previous_run=previous_run,
        progress=progress,
        scheduled_steps=scheduled_steps,
        time_limit=time_limit,
    )


def _look_for_the_end(
    found: FoundCheckpoint, progress: Progress, settings: Settings, output: Path, total_steps: int, world: World
) -> None:
    """Say where the run goes on. If its last epoch is exported it is complete, and no step is to be done again."""
    last = output / f"epoch_{settings.epochs - 1}"
    if world.gather(last.is_dir())[0]:
        progress.global_step, progress.epoch, progress.validation_pending = total_steps, settings.epochs, False
        sentence = f"The run is complete: {last} holds its weights, and there is nothing left to do."
    else:
        sentence = (
            f"Going on with {found.folder}: step {progress.global_step}, epoch {progress.epoch}, "
            f"{progress.tokens} tokens so far."
        )
    if world.is_rank_zero:
        say(sentence)
