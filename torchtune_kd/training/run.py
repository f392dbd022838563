"""A run: everything a recipe sets up, and the two things it does with it again and again."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtune import training

from torchtune_kd.training.checkpoint import save_epoch
from torchtune_kd.training.data import Batch, build_loaders, steps_per_epoch
from torchtune_kd.training.evaluate import evaluate
from torchtune_kd.training.loading import load_weights
from torchtune_kd.training.metrics import TrainingLog, validation_metrics
from torchtune_kd.training.models import Student, Teacher, build_student, build_teacher
from torchtune_kd.training.optim import build_lr_scheduler, build_optimizer, build_profiler
from torchtune_kd.training.preflight import check_run
from torchtune_kd.training.settings import Settings, build, build_kd_loss
from torchtune_kd.training.step import accumulate_gradients, gradient_norm
from torchtune_kd.training.world import World


@dataclass
class Run:
    """What ``set_up`` has built; ``global_step`` counts optimizer steps."""

    cfg: DictConfig
    settings: Settings
    world: World
    ignore_index: int
    loader: StatefulDataLoader
    val_loader: StatefulDataLoader | None
    steps_per_epoch: int
    teacher: Teacher | None
    student: Student
    trainable: list[nn.Parameter]
    checkpointer: Any
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    profiler: Any
    log: TrainingLog
    global_step: int = 0

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch


def set_up(cfg: DictConfig, settings: Settings, world: World) -> Run:
    """Check everything that can be checked without weights, then build data, models and optimizer.

    Raises:
        UserError: for whatever in config, files or data cannot work.
    """
    seed = training.set_seed(settings.seed, debug_mode=settings.cudnn_deterministic_mode)
    kd_loss = build_kd_loss(cfg)
    tokenizer = build(cfg, "tokenizer")
    max_seq_len = check_run(cfg, settings, tokenizer, world)
    loader, val_loader = build_loaders(cfg, settings, tokenizer, kd_loss.ignore_index, max_seq_len, seed, world)
    steps = steps_per_epoch(loader, settings.gradient_accumulation_steps, settings.max_steps_per_epoch)
    log = TrainingLog(cfg, settings, world, settings.epochs * steps)

    teacher = build_teacher(cfg, settings, world)
    checkpointer, weights = load_weights(cfg.get("checkpointer"), "checkpointer", world)
    student = build_student(cfg, settings, world, kd_loss, weights, seed)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(cfg, trainable)
    return Run(
        cfg=cfg,
        settings=settings,
        world=world,
        ignore_index=kd_loss.ignore_index,
        loader=loader,
        val_loader=val_loader,
        steps_per_epoch=steps,
        teacher=teacher,
        student=student,
        trainable=trainable,
        checkpointer=checkpointer,
        optimizer=optimizer,
        lr_scheduler=build_lr_scheduler(cfg, optimizer, settings.epochs * steps),
        profiler=build_profiler(cfg, world.device),
        log=log,
    )


def optimizer_step(run: Run, step: list[Batch], epoch: int) -> None:
    """Gradients of one step's microbatches, clipping, update, schedule, log."""
    metrics = run.log.wants(run.global_step + 1)
    sums = accumulate_gradients(run.student, run.teacher, step, metrics, run.ignore_index, run.world)
    grad_norm = gradient_norm(run.trainable, run.settings.clip_grad_norm)
    lr = run.optimizer.param_groups[0]["lr"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.lr_scheduler is not None:
        run.lr_scheduler.step()
    run.global_step += 1
    run.log.log_step(run.global_step, epoch, sums, lr, grad_norm)
    run.world.limit_waiting(run.settings.process_group_timeout)  # the first step waited for compilers and caches
    run.profiler.step()


def validate(run: Run) -> None:
    """Log the means over ``dataset_val``, where there is one."""
    if run.val_loader is None:
        return
    metrics = validation_metrics(run.settings)
    values = evaluate(
        run.student, run.teacher, run.val_loader, metrics, run.world, max_batches=run.settings.max_val_batches
    )
    run.log.log_validation(run.global_step, values)


def validation_due(run: Run) -> bool:
    """After every ``run_val_every_n_steps``-th step and after the last."""
    every = run.settings.run_val_every_n_steps
    return run.global_step == run.total_steps or (every is not None and run.global_step % every == 0)


def save(run: Run, epoch: int) -> None:
    """Write the weights of an epoch; the time it takes is left out of the tokens per second."""
    save_epoch(run.student, run.checkpointer, run.cfg, run.settings, run.world, epoch)
    run.log.restart_clock()
