"""A run: everything a recipe sets up, and what it does with it again and again."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtune import training

from torchtune_kd.training import folders
from torchtune_kd.training.checkpoint import save_epoch
from torchtune_kd.training.data import Batch, build_loaders, microbatches, steps_left, steps_per_epoch
from torchtune_kd.training.errors import Stopped
from torchtune_kd.training.evaluate import evaluate
from torchtune_kd.training.fingerprints import identity
from torchtune_kd.training.finite import end_run, rows_of_step
from torchtune_kd.training.loading import load_weights
from torchtune_kd.training.memory_advice import out_of_memory_explained
from torchtune_kd.training.metrics import TrainingLog, say, validation_metrics
from torchtune_kd.training.models import Student, Teacher, build_student, build_teacher
from torchtune_kd.training.optim import build_lr_scheduler, build_optimizer, build_profiler, move_schedule
from torchtune_kd.training.phases import phase
from torchtune_kd.training.preflight import check_run, check_shared_folder, output_folder, run_folders
from torchtune_kd.training.progress import Progress
from torchtune_kd.training.resume import Found, check_same_run, find_checkpoint, gather_state, restore_state
from torchtune_kd.training.rng import preserved_rng, rng_state, set_rng_state
from torchtune_kd.training.saving import Saver
from torchtune_kd.training.settings import Settings, build, build_kd_loss
from torchtune_kd.training.signals import StopRequests
from torchtune_kd.training.step import accumulate_gradients, gradient_norm
from torchtune_kd.training.time_limit import TimeLimit
from torchtune_kd.training.world import World

# The first step also opens connections and compiles kernels: it may take so many times as long as another.
FIRST_STEP = 5


@dataclass
class Run:
    """What ``set_up`` has built, and where the run stands."""

    cfg: DictConfig
    settings: Settings
    world: World
    ignore_index: int
    loader: StatefulDataLoader
    val_loader: StatefulDataLoader | None
    total_steps: int  # with max_minutes, as many as are planned at present
    teacher: Teacher | None
    student: Student
    trainable: list[nn.Parameter]
    checkpointer: Any
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    profiler: Any
    log: TrainingLog
    saver: Saver
    stale: list[Path]  # what an earlier run left in the output folder, until the first save replaces it
    progress: Progress
    scheduled_steps: int  # of the data and the config, whatever the time
    time_limit: TimeLimit | None = None
    stop_requests: StopRequests = field(default_factory=StopRequests)
    stopping: bool = False  # all processes know that one of them was asked to stop
    validation: dict[str, float] | None = None  # of this very step, where there was one
    generators: dict[str, Any] = field(default_factory=dict)  # as they were before the step's rows were read

    @property
    def global_step(self) -> int:
        return self.progress.global_step

    @property
    def time_is_up(self) -> bool:
        """Whether the run ends here since its minutes are over; the same on all processes."""
        return self.time_limit is not None and self.total_steps <= self.progress.global_step < self.scheduled_steps

    def close(self) -> None:
        """Finish what is being written."""
        self.saver.close()
        self.log.close()


def set_up(cfg: DictConfig, settings: Settings, world: World) -> Run:
    """Check everything that can be checked without weights, then build data, models and optimizer, or load them.

    Raises:
        UserError: for whatever in config, files or data cannot work.
    """
    began = TimeLimit.clock()
    output = output_folder(cfg, settings)
    check_shared_folder(output, settings, world)
    found = find_checkpoint(output, settings, world)
    progress = Progress() if found is None else Progress(**found.manifest.progress)
    seed = settings.seed if settings.seed is not None or found is None else found.manifest.seed
    seed = training.set_seed(seed, debug_mode=settings.cudnn_deterministic_mode)
    kd_loss = build_kd_loss(cfg)
    tokenizer = build(cfg, "tokenizer")
    limits = check_run(cfg, settings, tokenizer, world, resumed=found is not None)
    loader, val_loader = build_loaders(
        cfg, settings, tokenizer, kd_loss.ignore_index, limits.max_seq_len, limits.vocab, seed, world
    )
    sequences = settings.batch_size * settings.gradient_accumulation_steps * world.size
    traits = (
        identity(cfg, settings, loader.sampler.dataset, seed=seed, sequences_per_step=sequences)
        if world.is_rank_zero
        else {}
    )
    new_schedule = found is not None and check_same_run(found, traits, settings, world)

    epoch_steps = steps_per_epoch(loader, settings.gradient_accumulation_steps, settings.max_steps_per_epoch)
    total_steps = settings.epochs * epoch_steps
    if found is not None:
        loader.sampler.load_state_dict({"epoch": progress.epoch, "position": progress.samples})
        total_steps = progress.global_step + _steps_left(loader, settings, progress)
        total_steps += max(settings.epochs - progress.epoch - 1, 0) * epoch_steps
        _look_for_the_end(found, progress, settings, output, total_steps, world)
    elif world.is_rank_zero:
        folders.clean_up(output)
    scheduled_steps, time_limit = total_steps, None
    if settings.max_minutes is not None:
        time_limit = TimeLimit(60 * settings.max_minutes, began, progress.seconds)
        if progress.seconds >= time_limit.seconds:  # all that is left of the run is its export
            total_steps = progress.global_step
    stale = run_folders(output) if found is None else []
    log_file = None if found is None else found.manifest.log_file
    log = TrainingLog(cfg, settings, world, total_steps, progress, log_file)
    written = None if found is None else progress
    saver = Saver(cfg, settings, world, log, output=output, stale=stale, seed=seed, identity=traits, written=written)

    teacher = build_teacher(cfg, settings, world)
    checkpointer, weights = load_weights(cfg.get("checkpointer"), "checkpointer", world)
    student = build_student(cfg, settings, world, kd_loss, weights, seed)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(cfg, trainable)
    lr_scheduler = build_lr_scheduler(cfg, optimizer, scheduled_steps)
    profiler = build_profiler(cfg, world.device)
    if found is not None:
        restore_state(found, student, optimizer, lr_scheduler, world, new_schedule=new_schedule)
    if not settings.compile:
        world.barrier()
        world.limit_waiting(FIRST_STEP * settings.process_group_timeout)
    return Run(
        cfg=cfg,
        settings=settings,
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
        stale=stale,
        progress=progress,
        scheduled_steps=scheduled_steps,
        time_limit=time_limit,
    )


def steps(run: Run, epoch: int) -> Iterator[list[Batch]]:
    """The microbatches of each optimizer step that is left in ``epoch``; none once the time is up."""
    if run.time_is_up:
        return
    progress = run.progress
    if progress.epoch != epoch:
        progress.epoch, progress.step_in_epoch, progress.samples = epoch, 0, 0
    run.loader.sampler.load_state_dict({"epoch": epoch, "position": progress.samples})
    with preserved_rng(run.world.device):  # a loader draws a seed when it begins
        batches = iter(run.loader)
    left = _steps_left(run.loader, run.settings, progress)
    run.generators = rng_state(run.world.device)
    for step in microbatches(batches, run.settings.gradient_accumulation_steps, left):
        yield step
        if run.time_is_up:
            return
        run.generators = rng_state(run.world.device)  # before the next rows are read, which may draw from them


def optimizer_step(run: Run, step: list[Batch], epoch: int) -> None:
    """Gradients of one step's microbatches, clipping, update, schedule, log.

    A step without a finite loss and gradient leaves weights and optimizer as they are. A signal ends a step between
    two of its microbatches: the run is then where it was before the step, which the resumed run begins anew.

    Raises:
        RunError: after ``max_skipped_steps`` such steps in a row, or if memory runs out.
    """
    progress, settings = run.progress, run.settings
    metrics = run.log.wants(progress.global_step + 1)
    if run.time_limit is not None:
        run.time_limit.begin_step()
    with out_of_memory_explained(run, step):
        sums = accumulate_gradients(
            run.student, run.teacher, step, metrics, run.ignore_index, run.world, lambda: _asked_to_stop(run)
        )
        if sums is None:
            run.optimizer.zero_grad(set_to_none=True)
            set_rng_state(run.generators, run.world.device)
            return
        loss, grad_norm = _agree(run, sums, gradient_norm(run.trainable, settings.clip_grad_norm))
        lr = run.optimizer.param_groups[0]["lr"]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            with phase("optimizer"):
                run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.lr_scheduler is not None and run.time_limit is not None:
        done = (progress.global_step + 1) / run.total_steps
        move_schedule(run.lr_scheduler, done * run.scheduled_steps)
    elif run.lr_scheduler is not None:
        run.lr_scheduler.step()

    samples = run.world.size * sum(len(batch["tokens"]) for batch in step)
    rows = [] if finite else rows_of_step(run.loader.sampler, progress, samples)
    progress.global_step += 1
    progress.step_in_epoch += 1
    progress.samples = min(progress.samples + samples, len(run.loader.sampler.dataset))
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
    progress.skipped_steps += not finite
    every = settings.run_val_every_n_steps
    progress.validation_pending = progress.global_step == run.total_steps or (
        every is not None and progress.global_step % every == 0
    )
    run.validation = None

    run.log.log_step(progress.global_step, epoch, sums, lr, grad_norm, progress.skipped_steps)
    if run.time_is_up:
        progress.seconds = max(progress.seconds, run.time_limit.seconds)  # a run that is resumed here is over, too
        run.log.say(f"The time is up: {settings.max_minutes:g} minutes were enough for {progress.global_step} steps.")
    if not finite:
        run.log.say(
            f"warning: step {progress.global_step} is skipped, since its loss ({loss:g}) or gradient norm "
            f"({grad_norm:g}) is not finite: weights and optimizer are as before ({progress.skipped_steps} so far)."
        )
        if progress.skipped_in_a_row >= settings.max_skipped_steps:
            run.saver.finish()
            end_run(step, rows, progress, loss, grad_norm, output_folder(run.cfg, settings), run.world)
    run.world.limit_waiting(settings.process_group_timeout)
    run.profiler.step()


def validate_if_due(run: Run) -> None:
    """Log the means over ``dataset_val``, where there is one: before the first step, every so often, at the end."""
    if not run.progress.validation_pending:
        return
    if run.val_loader is not None:
        metrics = validation_metrics(run.settings)
        if run.time_limit is not None:
            run.time_limit.begin_validation()
        with (
            preserved_rng(run.world.device),
            out_of_memory_explained(run, None),
        ):  # to validate more often changes no step
            values = evaluate(
                run.student,
                run.teacher,
                run.val_loader,
                metrics,
                run.world,
                max_batches=run.settings.max_val_batches,
                interrupted=lambda: _asked_to_stop(run),
            )
        if values is None:
            return  # what is left out here comes first when the run goes on
        run.validation = run.log.log_validation(run.progress.global_step, values)
        if run.time_limit is not None:
            run.time_limit.end_validation()
    run.progress.validation_pending = False


def checkpoint_if_due(run: Run) -> None:
    """Write ``step_<n>`` where the settings or a signal ask for it.

    Raises:
        Stopped: after a signal.
    """
    if run.stopping:
        run.saver.finish()  # if that one fails there is still time for another
    due = run.saver.is_due(run.progress, run.validation)
    missing = run.progress.global_step > 0 and not run.saver.is_written(run.progress)
    good = True
    if due or (run.stopping and missing):
        good = _write_checkpoint(run, wait=run.stopping)
    if run.stopping:
        step, name = run.progress.global_step, run.stop_requests.name or "a signal to another process"
        kept = f"its checkpoint is {run.saver.folder(step)}" if good and step else "no checkpoint of it is written"
        raise Stopped(f"{name} ended the run after step {step}; {kept}: go on with `resume_from_checkpoint=True`.")


def save(run: Run, epoch: int) -> None:
    """Write the weights of an epoch; the time it takes is left out of the tokens per second.

    Where checkpoints are wanted one comes first: a run with an epoch and without a checkpoint could not go on. Once the
    time is up these are the weights of the last epoch, whichever it was, as if all had been done.
    """
    if run.time_is_up and epoch < run.settings.epochs - 1:
        return
    run.saver.finish()
    if run.settings.save_every_n_steps is not None and not run.saver.has_written:
        _write_checkpoint(run, wait=True)
    save_epoch(run.student, run.checkpointer, run.cfg, run.settings, run.world, epoch, run.stale)
    run.log.restart_clock()


def _write_checkpoint(run: Run, *, wait: bool) -> bool:
    run.progress.tokens = run.log.all_tokens()
    state = gather_state(run.student, run.optimizer, run.lr_scheduler, run.world)
    good = run.saver.save(state, run.progress, run.validation, wait=wait)
    run.log.restart_clock()
    return good


def _agree(run: Run, sums: dict[str, Tensor], grad_norm: Tensor) -> tuple[float, float]:
    """Return the step's mean loss and gradient norm, alike on all processes.

    They also agree on whether any was asked to stop, and on the steps that rank 0 plans by its clock.
    """
    seconds, planned = 0.0, 0
    if run.time_limit is not None and run.world.is_rank_zero:
        seconds, planned = run.time_limit.plan(run.progress.global_step + 1, run.scheduled_steps)
    ours = torch.tensor([run.stop_requests.pending, seconds, planned], dtype=sums["loss"].dtype)
    ours = ours.to(run.world.device, non_blocking=True)
    totals = run.world.sum(torch.cat([torch.stack([sums["loss"], sums["num_tokens"].to(ours)]), ours]))
    # one wait for the device
    loss, num_tokens, asked, seconds, planned, norm = torch.cat([totals, grad_norm.to(totals).reshape(1)]).tolist()
    run.stopping = run.stopping or asked > 0
    if run.time_limit is not None:
        run.progress.seconds, run.total_steps = seconds, int(planned)
        run.log.set_total(run.total_steps)
    return loss / max(num_tokens, 1.0), norm


def _asked_to_stop(run: Run) -> bool:
    run.stopping = run.stopping or run.world.any(run.stop_requests.pending)
    return run.stopping


def _steps_left(loader: StatefulDataLoader, settings: Settings, progress: Progress) -> int:
    """Optimizer steps from the sampler's position to the end of its epoch."""
    limit = None if settings.max_steps_per_epoch is None else settings.max_steps_per_epoch - progress.step_in_epoch
    return steps_left(loader, settings.gradient_accumulation_steps, limit)


def _look_for_the_end(
    found: Found, progress: Progress, settings: Settings, output: Path, total_steps: int, world: World
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
