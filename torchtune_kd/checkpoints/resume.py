"""Go on with a run: find its newest whole checkpoint, compare it with the config, and load it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchtune_kd.checkpoints import folders
from torchtune_kd.checkpoints.identity import GROUPS, differences
from torchtune_kd.checkpoints.rng import rng_state, set_rng_state
from torchtune_kd.checkpoints.writer import check_whole, layout, pack, read_state, room_for, unpack
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, say
from torchtune_kd.models.adapters import without_checkpoint_wrapper
from torchtune_kd.storage import atomic
from torchtune_kd.storage.manifest import Damaged, Manifest


@dataclass(frozen=True)
class FoundCheckpoint:
    """A whole checkpoint."""

    folder: Path
    manifest: Manifest


def find_checkpoint(output: Path, settings: Settings, world: World) -> FoundCheckpoint | None:
    """Find the newest whole checkpoint to go on with; return None if the run begins at the beginning.

    What a killed run left half done is cleaned up; a damaged checkpoint is renamed, with a sentence.

    Raises:
        UserError: if there are checkpoints, and all of them are damaged.
    """
    if not settings.resume_from_checkpoint:
        return None
    if world.is_rank_zero:
        folders.clean_up(output)
    damaged = []
    for folder in world.gather(folders.step_folders(output) if world.is_rank_zero else None)[0]:
        try:
            manifest = check_whole(folder, world)
        except Damaged as error:
            damaged.append(folder)
            if world.is_rank_zero:
                say(f"warning: the checkpoint {folder} is damaged ({error}): it is stepped over.")
            continue
        if world.is_rank_zero:
            for other in damaged:
                say(f"The damaged checkpoint is kept as {atomic.set_aside(other)}.")
        world.barrier()
        return FoundCheckpoint(folder, manifest)
    if damaged:
        raise UserError(
            f"Every checkpoint in {output} is damaged ({', '.join(folder.name for folder in damaged)}): to start from "
            "the beginning, delete them or choose another `output_dir`."
        )
    if world.is_rank_zero:
        say(f"There is no checkpoint in {output} yet: the run starts from the beginning.")
    return None


def check_same_run(found: FoundCheckpoint, identity: Mapping[str, Any], settings: Settings, world: World) -> bool:
    """Refuse a checkpoint that was made with other settings than ``identity`` (rank 0's), or tell what changes.

    Returns:
        bool: whether optimizer settings, schedule or length of the run are new ones, which is allowed only then.

    Raises:
        UserError: naming what differs, and the option that goes on all the same where that is possible.
    """
    found_differences = None
    if world.is_rank_zero:
        then = found.manifest.identity
        found_differences = [differences(then, identity, groups) for groups in (("student",), ("training",), GROUPS)]
    fatal, schedule, any_ = world.gather(found_differences)[0]
    if fatal:
        raise UserError(
            f"The checkpoint {found.folder} holds another student: {'; '.join(fatal)}: set that back or choose "
            "another `output_dir`."
        )
    if any_ and not settings.resume_despite_changes:
        raise UserError(
            f"The checkpoint {found.folder} was made with other settings: {'; '.join(any_)}: set them back, choose "
            "another `output_dir`, or set `resume_despite_changes: True` to go on with the new ones."
        )
    if any_ and world.is_rank_zero:
        say(f"warning: the run goes on although settings changed: {'; '.join(any_)}.")
    return bool(schedule)


def gather_state(
    student: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    world: World,
    teacher: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Any]:
    """Gather what a run goes on with besides its :class:`Progress`: trained weights, optimizer, schedule, generators.

    The tensors are the run's own, not copies. ``teacher`` is what the teacher keeps, where the student changes it.
    """
    shared = {"param_groups": _without_params(optimizer), "lr_scheduler": lr_scheduler and lr_scheduler.state_dict()}
    state = {
        "model": trained_weights(student.decoder),
        "shared": pack(shared),
        "rng": {f"rank_{world.rank}": pack(rng_state(world.device))},
    }
    if teacher:
        state["teacher"] = dict(teacher)
    if optimizer.state:  # empty before the first step; torch would make one up, and count a step for it
        state["optimizer"] = get_optimizer_state_dict(student, optimizer)["state"]
    return state


def restore_state(
    found: FoundCheckpoint,
    student: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    world: World,
    *,
    new_schedule: bool,
) -> None:
    """Put everything of :func:`gather_state` back, on whatever number of processes wrote it.

    With ``new_schedule`` the optimizer's options are those of the config, and the schedule is the config's after as
    many steps. A process beyond the number that wrote it keeps the generators that its seed gave it.
    """
    rng_name = f"rank_{world.rank}"
    options, saved = _without_params(optimizer), layout(found.folder)
    state = {"shared": room_for(saved["shared"]), "model": trained_weights(student.decoder)}
    if f"rng.{rng_name}" in saved:
        state["rng"] = {rng_name: room_for(saved[f"rng.{rng_name}"])}
    optimizer_state = None
    if any(name.startswith("optimizer.") for name in saved):
        optimizer_state = get_optimizer_state_dict(student, optimizer)  # makes it up, to be overwritten
        state["optimizer"] = optimizer_state["state"]
    read_state(found.folder, state, world)
    if optimizer_state is not None:
        set_optimizer_state_dict(student, optimizer, optimizer_state)
    shared = unpack(state["shared"])
    for group, values in zip(optimizer.param_groups, options if new_schedule else shared["param_groups"], strict=True):
        group.update(values)
    if lr_scheduler is not None and not new_schedule:
        lr_scheduler.load_state_dict(shared["lr_scheduler"])
    elif lr_scheduler is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(found.manifest.progress["global_step"]):
                lr_scheduler.step()
    if "rng" in state:
        set_rng_state(unpack(state["rng"][rng_name]), world.device)


def restore_teacher(found: FoundCheckpoint, kept: Mapping[str, Tensor], world: World) -> None:
    """Read what a teacher keeps into its own tensors; with a checkpoint of a run without such a teacher, say so."""
    if not kept:
        return
    if any(name.startswith("teacher.") for name in layout(found.folder)):
        read_state(found.folder, {"teacher": dict(kept)}, world)
    elif world.is_rank_zero:
        say(
            f"warning: the checkpoint {found.folder} holds no average of the student's weights, since its run kept "
            "none: the teacher begins as the student of that step."
        )


def trained_weights(decoder: nn.Module) -> dict[str, Any]:
    """Return the trainable parameters, not copies, by the names that they have without wrappers."""
    return {
        without_checkpoint_wrapper(name): parameter.detach()
        for name, parameter in decoder.named_parameters()
        if parameter.requires_grad
    }


def _without_params(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
