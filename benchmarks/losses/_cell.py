"""One implementation on one case: time, memory and errors, in the process that calls this."""

import gc
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_kd.kernels._torch.workspaces import WORKSPACES

from .._device import added_bytes, time_calls
from ._case import Case
from ._compiled import instructions_per_logit
from ._implementations import IMPLEMENTATIONS, Implementation
from ._inputs import SLICE, Inputs, Truth


class Cell(NamedTuple):
    """Hold what one implementation did on one case; `missing` says why there are no numbers."""

    key: str
    missing: str | None = None
    seconds: float | None = None  # median
    fastest: float | None = None
    cpu_seconds: float | None = None  # mean, of all threads; on a CPU
    repeats: int = 0
    warm_up: float | None = None
    added_bytes: int | None = None  # above the inputs
    extra_bytes: int | None = None  # above the inputs and the gradients returned
    loss_error: float | None = None  # relative
    gradient_error: float | None = None  # norm of the difference over the norm
    notes: tuple[str, ...] = ()
    instructions: float | None = None  # that the kernel issues for a logit, where they are counted
    host_seconds: float | None = None  # until the call comes back; on a GPU


def find(key: str, op: str) -> Implementation:
    return next(one for one in IMPLEMENTATIONS if one.key == key and op in one.ops)


def run(implementation: Implementation, inputs: Inputs, case: Case) -> tuple[Tensor, list[Tensor]]:
    """Loss, and the gradients of what requires one: the student's logits or hidden states, and its head."""
    leaf = inputs.student.detach().requires_grad_(case.gradient)
    leaves = [leaf]
    head = inputs.student_head
    if head is not None and case.gradient and case.trainable_head:
        head = head.detach().requires_grad_()
        leaves.append(head)
    with torch.set_grad_enabled(case.gradient):
        loss = implementation.call(inputs._replace(student=leaf, student_head=head), implementation.effective(case))
    if not case.gradient:
        return loss.detach(), []
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def measure_cell(implementation: Implementation, inputs: Inputs, truth: Truth, case: Case, budget: float) -> Cell:
    """Errors first, then time, then memory; an exception becomes the reason why there are no numbers.

    Args:
        implementation (Implementation): what to call.
        inputs (Inputs): of the case.
        truth (Truth | None): of ``implementation.effective(case)``; None leaves the errors out.
        case (Case): what to compute.
        budget (float): seconds to repeat for.
    """
    device = inputs.student.device.type
    if implementation.key.endswith("compile"):
        _allow_many_shapes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measure(implementation, inputs, truth, case, budget, device)
    except Exception as error:
        reason = describe_error(error)
    # outside of the handler, where the traceback no longer holds what is to be freed
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return Cell(implementation.key, reason)


def _measure(
    implementation: Implementation, inputs: Inputs, truth: Truth | None, case: Case, budget: float, device: str
) -> Cell:
    def call() -> tuple[Tensor, list[Tensor]]:
        return run(implementation, inputs, case)

    loss_error, gradient_error, gradient_bytes = None, None, 0
    times, (loss, grads) = _timed(call, device, budget)
    gradient_bytes = sum(grad.nbytes for grad in grads)
    if truth is not None:
        right = truth.loss + implementation.entropy_share(case) * truth.teacher_entropy
        loss_error = abs(loss.item() / right - 1)
        if truth.grad is not None:
            gradient_error = ((grads[0][:SLICE].double().cpu() - truth.grad).norm() / truth.grad.norm()).item()
    del loss, grads
    WORKSPACES.spare.clear()  # what our own calls leave to the next counts as added by each
    added = added_bytes(call, device)
    return Cell(
        implementation.key,
        None,
        times.median,
        min(times.calls),
        times.cpu,
        len(times.calls),
        times.warm_up,
        added,
        added - gradient_bytes,
        loss_error,
        gradient_error,
        tuple(implementation.notes(case)),
        instructions_per_logit(case) if implementation.key == "ours-triton" and device == "cuda" else None,
        times.host,
    )


def _timed(call: Callable[[], tuple], device: str, budget: float) -> tuple:
    """Times, and what one more call returns; that one comes last, so errors are those of a call that was timed."""
    times = time_calls(call, device, budget)
    return times, call()


def _allow_many_shapes() -> None:
    """A compiled function meets many shapes here, each a compilation; beyond a limit it would run uncompiled."""
    import torch._dynamo.config as config

    for limit in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, limit):
            setattr(config, limit, 256)


def describe_error(error: BaseException) -> str:
    """One line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:160]}"
