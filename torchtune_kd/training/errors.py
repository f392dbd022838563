"""How a run ends early: one sentence, no traceback, an exit code that says why.

| exit code | why |
|---|---|
| 2 | :class:`UserError`: the config, the files or the launch; the same command would fail again |
| 3 | :class:`RunError`: the run cannot go on (no finite step, no memory, no space for the weights, a process is gone) |
| 75 | :class:`Stopped`: a signal asked for it and a checkpoint is written; resume with the same command |
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class UserError(ValueError):
    """A mistake in the config, the files or the launch. The message is one sentence: what, where, what to do."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that was set up well and cannot go on. The message is one sentence: what, where, what to do."""

    exit_code = 3


class Stopped(Exception):
    """A run that ended because a signal asked for it. The message is one sentence that says how to go on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def one_sentence(recipe_main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a recipe's main function: the errors above end the process with their sentence and exit code."""

    @functools.wraps(recipe_main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return recipe_main(*args, **kwargs)
        except (UserError, RunError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except Stopped as stopped:
            print(f"stopped: {stopped}", file=sys.stderr, flush=True)
            sys.exit(stopped.exit_code)
        except RuntimeError as error:
            if not _a_process_is_missing(error):
                raise
            print(
                "error: Another process of the run is gone, or this one waited for it for longer than "
                "`process_group_timeout`; its own output says why. Go on from the last checkpoint with "
                "`resume_from_checkpoint=True`, which torchrun's --max_restarts does by itself. "
                f"({' '.join(str(error).split())[:300]})",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(RunError.exit_code)

    return wrapper


def _a_process_is_missing(error: RuntimeError) -> bool:
    """What collectives raise then: NCCL errors of their own type, gloo's a RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
