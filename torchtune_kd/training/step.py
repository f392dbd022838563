"""One optimizer step: teacher first, then the student and its loss, microbatch by microbatch.

    L = 1/|V| Σ_{i∈V} [ (1-α) CE_i + α T² D_i ],   V = valid tokens of all microbatches and processes of the step

|V| is known before the first backward (labels are on the host anyway), so each microbatch's sum is divided by it
once and nothing is rescaled afterwards. FSDP2 averages gradients over the W processes, hence the factor W.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchtune_kd.checkpoints.folders import output_folder
from torchtune_kd.checkpoints.rng import set_rng_state
from torchtune_kd.data.batches import Batch, attention_inputs
from torchtune_kd.distributed.sharding import reshard
from torchtune_kd.distributed.world import World
from torchtune_kd.models.student import HostTensor, Student
from torchtune_kd.teachers.live import Teacher
from torchtune_kd.training.nonfinite import end_run, rows_of_step
from torchtune_kd.training.optim import move_schedule
from torchtune_kd.training.phases import phase, student_phases
from torchtune_kd.training.run import Run, asked_to_stop


def count_valid_tokens(step: Sequence[Batch], ignore_index: int) -> int:
    """Valid labels of this process in the microbatches of a step."""
    return sum(int((batch["labels"] != ignore_index).sum()) for batch in step)


def forward(
    student: Student, teacher: Teacher | None, batch: Batch, metrics: tuple[str, ...], world: World
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss sum (0-d, with graph if gradients are on) and metric sums of one microbatch."""

    def move(value: Any) -> Any:
        return value.to(world.device, non_blocking=True) if isinstance(value, Tensor) else value.to(world.device)

    tokens, attention = move(batch["tokens"]), attention_inputs(batch, move)
    with phase("teacher"):
        teacher_hidden = teacher(tokens, **attention) if teacher is not None else None  # [B, S, D_t], all that is kept
        teacher_head = teacher.head() if teacher is not None else None
    # the labels stay on the host: finding the valid ones there waits for no device
    with student_phases(student):
        return student(tokens, HostTensor(batch["labels"]), teacher_hidden, teacher_head, metrics, **attention)


def accumulate_gradients(
    student: Student,
    teacher: Teacher | None,
    step: Sequence[Batch],
    metrics: tuple[str, ...],
    ignore_index: int,
    world: World,
    interrupted: Callable[[], bool] = lambda: False,
    announce: Callable[[str], None] = lambda event: None,
) -> dict[str, Tensor] | None:
    """Forward and backward over the microbatches of one step; gradients are those of L above, complete and reduced.

    ``interrupted`` is asked between two microbatches, on all processes with the same answer; if it is true the step
    is given up and its gradients are of no use. ``announce`` is told of ``step`` and every ``microbatch``.

    Returns:
        dict[str, Tensor] | None: sums over this process's tokens: ``loss``, the metrics asked for, ``num_tokens``;
        None if the step was given up.
    """
    announce("step")
    num_tokens = world.sum(torch.full((), float(count_valid_tokens(step, ignore_index)), device=world.device))
    scale = world.size / num_tokens.clamp(min=1)  # no valid token anywhere: the loss sum is 0 and stays 0
    sums: dict[str, Tensor] = {}
    for index, batch in enumerate(step):
        if index > 0 and interrupted():
            if teacher is not None:
                teacher.release()
            reshard(student)
            return None
        if isinstance(student, FSDPModule):
            is_last = index + 1 == len(step)
            student.set_requires_gradient_sync(is_last)
            student.set_reshard_after_backward(is_last, recurse=student.keeps_layers_gathered)
        announce("microbatch")
        loss, batch_sums = forward(student, teacher, batch, metrics, world)
        with phase("backward"):
            (loss * scale).backward()
        add(sums, {"loss": loss.detach(), **batch_sums})
    if teacher is not None:
        teacher.release()
    return sums


def add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add ``more`` to ``sums`` in place, name by name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


@phase("optimizer")
def gradient_norm(parameters: Sequence[nn.Parameter], clip: float | None) -> Tensor:
    """The 2-norm of all gradients over all processes (0-d, fp32); with ``clip`` they are scaled down to that norm."""
    # torch.nn.utils.get_total_norm would sum bf16 gradients in bf16
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm


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
    run.microbatches = step
    sums = accumulate_gradients(
        run.student,
        run.teacher,
        step,
        metrics,
        run.ignore_index,
        run.world,
        interrupted=lambda: asked_to_stop(run),
        announce=run.events.announce,
    )
    if sums is None:
        run.optimizer.zero_grad(set_to_none=True)
        set_rng_state(run.generators, run.world.device)
        return
    run.events.announce("gradients")
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
    run.events.announce("update")


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
