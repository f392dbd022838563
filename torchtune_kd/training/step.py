"""One optimizer step: teacher first, then the student and its loss, microbatch by microbatch.

    L = 1/|V| Σ_{i∈V} [ (1-α) CE_i + α T² D_i ],   V = valid tokens of all microbatches and processes of the step

|V| is known before the first backward (labels are on the host anyway), so each microbatch's sum is divided by it
once and nothing is rescaled afterwards. FSDP2 averages gradients over the W processes, hence the factor W.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtune_kd.checkpoints.folders import output_folder
from torchtune_kd.checkpoints.rng import set_rng_state
from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.sharding import reshard
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import phase
from torchtune_kd.models.student import Student
from torchtune_kd.training.nonfinite import end_run, rows_of_step
from torchtune_kd.training.optim import move_schedule
from torchtune_kd.training.run import Run, asked_to_stop


class Step:
    """The microbatches of one optimizer step, one after the other on the device, and what their backward passes leave.

    It ends early where a process was asked to stop: the step is given up then, and its gradients are of no use.

    Args:
        student (Student): whose gradients are reduced, and gathered layers given back, in the last microbatch.
        microbatches (list[Batch]): of this process, on the host.
        metrics (tuple[str, ...]): what to compute beside the loss, out of ``torchtune_kd.kernels.METRICS``.
        ignore_index (int): label of the tokens that do not count.
        world (World): all its processes take the step together.
        interrupted (Callable[[], bool]): asked between two microbatches, on all processes with the same answer.
        expect (Callable[[Batch], None]): told of each microbatch, still on the host, one microbatch ahead.
        announce (Callable[[str], None]): told of every ``microbatch``.

    Attributes:
        sums (dict[str, Tensor]): over this process's tokens: ``loss``, the metrics and ``num_tokens``.
        given_up (bool): whether it ended early.
    """

    def __init__(
        self,
        student: Student,
        microbatches: list[Batch],
        metrics: tuple[str, ...],
        ignore_index: int,
        world: World,
        interrupted: Callable[[], bool] = lambda: False,
        expect: Callable[[Batch], None] = lambda batch: None,
        announce: Callable[[str], None] = lambda event: None,
    ) -> None:
        self.microbatches, self.metrics = microbatches, metrics
        self.sums: dict[str, Tensor] = {}
        self.given_up = False
        self._student, self._world = student, world
        self._interrupted, self._expect, self._announce = interrupted, expect, announce
        self._scale = gradient_scale(microbatches, ignore_index, world)

    def __iter__(self) -> Iterator[Batch]:
        self._expect(self.microbatches[0])
        for index, batch in enumerate(self.microbatches):
            if index > 0 and self._interrupted():
                self.given_up = True
                return
            self._student.prepare_microbatch(is_last=index + 1 == len(self.microbatches))
            if index + 1 < len(self.microbatches):
                self._expect(self.microbatches[index + 1])
            self._announce("microbatch")
            yield batch.to(self._world.device)

    def backward(self, loss: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Add the gradient of ``loss`` · W / |V|, and count."""
        with phase("backward"):
            (loss * self._scale).backward()
        add_sums(self.sums, {"loss": loss.detach(), **sums})


def gradient_scale(microbatches: Sequence[Batch], ignore_index: int, world: World) -> Tensor:
    """Return W / |V| (0-d): by it a microbatch's loss sum becomes its part of L, and FSDP2's mean a sum."""
    valid = sum(int((batch.labels != ignore_index).sum()) for batch in microbatches)
    num_tokens = world.sum(torch.full((), float(valid), device=world.device))
    return world.size / num_tokens.clamp(min=1)  # no valid token anywhere: the loss sum is 0 and stays 0


def add_sums(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add ``more`` to ``sums`` in place, name by name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


@phase("optimizer")
def gradient_norm(parameters: Sequence[nn.Parameter], clip: float | None) -> Tensor:
    """Compute the 2-norm of all gradients over all processes (0-d, fp32); with ``clip``, scale them down to it."""
    # torch.nn.utils.get_total_norm would sum bf16 gradients in bf16
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm


def begin_step(run: Run, microbatches: list[Batch]) -> Step:
    """Begin an optimizer step: |V| over all processes is known from here on."""
    if run.time_limit is not None:
        run.time_limit.begin_step()
    run.microbatches = microbatches
    run.events.announce("step")
    return Step(
        run.student,
        microbatches,
        run.log.wants(run.progress.global_step + 1),
        run.ignore_index,
        run.world,
        interrupted=lambda: asked_to_stop(run),
        expect=run.teacher.expect,
        announce=run.events.announce,
    )


def finish_step(run: Run, step: Step) -> None:
    """End an optimizer step: clip, update, schedule, count and log.

    A step without a finite loss and gradient leaves weights and optimizer as they are. One that was given up leaves the
    run where it was before it; the resumed run begins it anew.

    Raises:
        RunError: after ``max_skipped_steps`` steps in a row that are not finite.
    """
    progress, settings, sums = run.progress, run.settings, step.sums
    run.teacher.end_step(run.student)
    if step.given_up:
        reshard(run.student)
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
            run.teacher.after_update(run.student)
    run.optimizer.zero_grad(set_to_none=True)
    if run.lr_scheduler is not None and run.time_limit is not None:
        done = (progress.global_step + 1) / run.total_steps
        move_schedule(run.lr_scheduler, done * run.scheduled_steps)
    elif run.lr_scheduler is not None:
        run.lr_scheduler.step()

    samples = run.world.size * sum(len(batch.tokens) for batch in step.microbatches)
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

    run.log.log_step(progress.global_step, progress.epoch, sums, lr, grad_norm, progress.skipped_steps)
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
            end_run(step.microbatches, rows, progress, loss, grad_norm, output_folder(run.config), run.world)
    run.world.set_timeout(settings.process_group_timeout)
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
