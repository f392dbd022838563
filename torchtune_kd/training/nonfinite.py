"""Steps whose loss or gradient is not finite: skipped, counted, and after too many in a row the end of the run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from torchtune_kd.checkpoints.progress import Progress
from torchtune_kd.data.batches import Batch
from torchtune_kd.data.sampler import EachSampleOnce
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import RunError

SHOWN_ROWS = 16


def end_run(
    step: Sequence[Batch],
    rows: list[int],
    progress: Progress,
    loss: float,
    grad_norm: float,
    output: Path,
    world: World,
) -> None:
    """Write this process's microbatches beside the checkpoints, and raise.

    Args:
        step (Sequence[Batch]): the microbatches of this process in the step, on the host.
        rows (list[int]): the dataset's rows in the step, over all processes.
        progress (Progress): the run's, with the step counted.
        loss (float): mean over the step's tokens.
        grad_norm (float): over all processes.
        output (Path): where checkpoints lie.
        world (World): all its processes call this.

    Raises:
        RunError: always; it names the step, its rows and the files.
    """
    file = output / f"bad_step_{progress.global_step}" / f"rank_{world.rank}.pt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"step": progress.global_step, "epoch": progress.epoch, "rows": rows}
        torch.save(content | {"microbatches": [vars(batch) for batch in step]}, file)
        written = f"it is written to {file.parent}"
    except (OSError, RuntimeError) as error:
        written = f"it could not be written to {file.parent} ({error})"
    world.barrier()
    shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
    raise RunError(
        f"{progress.skipped_in_a_row} steps in a row had no finite loss and gradient (the last, step "
        f"{progress.global_step}: loss {loss:g}, gradient norm {grad_norm:g}): look at its batch, rows {shown} of "
        f"`dataset`, {written}; a lower learning rate, `clip_grad_norm` or other data may help, and "
        "`max_skipped_steps` says how many such steps are borne."
    )


def rows_of_step(sampler: EachSampleOnce, progress: Progress, count: int) -> list[int]:
    """Return the dataset's rows that all processes together consume in the next ``count`` samples."""
    return sampler.order()[progress.samples : progress.samples + count]
