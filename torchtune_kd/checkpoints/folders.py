"""The folders of a run: ``step_<n>`` to go on with and ``epoch_<n>`` for others."""

import os
import re
import shutil
import uuid
from pathlib import Path

from torchtune_kd.config.reading import Config
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, first_line
from torchtune_kd.storage.atomic import OLD, REPLACED

STEP = re.compile(r"step_(\d+)")
_OF_A_RUN = re.compile(r"(step|epoch)_\d+")
_HALF_DONE = re.compile(r"((?:step|epoch)_\d+)(\.partial|\.old|\.deleted)")


def step_folder(output: Path, step: int) -> Path:
    return output / f"step_{step}"


def step_folders(output: Path) -> list[Path]:
    """Return the checkpoints in ``output``, newest first."""
    if not output.is_dir():
        return []
    found = {int(match[1]): path for path in output.iterdir() if (match := STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def clean_up(output: Path) -> None:
    """Clean up what a killed run left half done: forget what was begun, keep what was about to be replaced."""
    if not output.is_dir():
        return
    paths = sorted(output.iterdir())
    if any(_OF_A_RUN.fullmatch(path.name) for path in paths):  # else nothing has replaced them yet
        for path in paths:
            if path.name.startswith(REPLACED) and _OF_A_RUN.fullmatch(path.name.removeprefix(REPLACED)):
                shutil.rmtree(path)
    for path in paths:
        match = _HALF_DONE.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == OLD and not path.with_name(match[1]).exists():
            path.rename(path.with_name(match[1]))
        else:
            shutil.rmtree(path)


def check_output_folder(config: Config) -> None:
    """Refuse a folder with epochs or checkpoints of an earlier run, unless ``overwrite_output_dir`` is set."""
    folder, settings = output_folder(config), config.settings
    saved = run_folders(folder)
    if saved and not settings.overwrite_output_dir:
        steps = any(path.name.startswith("step") for path in saved)
        go_on = " set `resume_from_checkpoint: True` to go on with it," if steps else ""
        raise UserError(
            f"The output folder {folder} already holds a run ({', '.join(path.name for path in saved)}):{go_on} "
            "choose another `output_dir`, or set `overwrite_output_dir: True` to replace it when the first checkpoint "
            "is written."
        )
    for section in filter(None, (config.checkpointer, *(each.teacher_checkpointer for each in config.each_teacher()))):
        source = section.get("checkpoint_dir")
        if source is not None and any(Path(str(source)).resolve().is_relative_to(path.resolve()) for path in saved):
            raise UserError(
                f"`{section.path}.checkpoint_dir` is {source}, which `overwrite_output_dir: True` would replace: "
                "choose another `output_dir`."
            )


def check_shared_folder(folder: Path, settings: Settings, world: World) -> None:
    """Refuse an output folder that not all processes see, where checkpoints are written or read.

    Raises:
        UserError: on every process, if one of them does not find what rank 0 puts there, or rank 0 cannot.
    """
    if not world.sharded or (
        settings.save_every_n_steps is None and settings.keep_best is None and not settings.resume_from_checkpoint
    ):
        return
    check_one_folder(folder, "output_dir", world, "or save and resume nothing")


def check_one_folder(folder: Path, key: str, world: World, otherwise: str = "or start one process") -> None:
    """Refuse a folder that not all processes see.

    Args:
        folder (Path): made where it is not there.
        key (str): of the config, which names it.
        world (World): the processes.
        otherwise (str): what else can be done, for the sentence.

    Raises:
        UserError: on every process, if one of them does not find what rank 0 puts there, or rank 0 cannot.
    """
    mark, why = folder / f".seen_{uuid.uuid4().hex}", None
    if world.is_rank_zero:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            why = first_line(error)
    name, why = world.gather((mark.name, why))[0]
    blind = [rank for rank, seen in enumerate(world.gather(os.path.isfile(folder / name))) if not seen]
    if why is not None:
        raise UserError(f"Expected `{key}` to be a folder that can be written, got {folder}: {why}.")
    if world.is_rank_zero:
        mark.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"Expected `{key}` to be one folder for all processes, but what rank 0 writes into {folder} is not "
            f"there for {'rank' if len(blind) == 1 else 'ranks'} {', '.join(map(str, blind))}: put it on a file "
            f"system that all nodes share, {otherwise}."
        )


def output_folder(config: Config) -> Path:
    """Return where checkpoints go."""
    usual = config.settings.output_dir
    return Path(str(usual if config.checkpointer is None else config.checkpointer.get("output_dir", usual)))


def run_folders(folder: Path) -> list[Path]:
    """Return the epochs and checkpoints that a run has written into ``folder``."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _OF_A_RUN.fullmatch(path.name))
