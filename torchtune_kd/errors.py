"""How a run ends early: one sentence, no traceback, an exit code that says why.

| exit code | why |
|---|---|
| 2 | :class:`UserError`: the config, the files or the launch; the same command would fail again |
| 3 | :class:`RunError`: the run cannot go on (no finite step, no memory, no space for the weights, a process is gone) |
| 75 | :class:`Stopped`: a signal asked for it and a checkpoint is written; resume with the same command |
| 130 | SIGINT before or after training |

Under torchrun, which ends with 1 whatever its processes end with, a mistake is also written into the file that the
variable ``TORCHTUNE_KD_MISTAKE_FILE`` names, so that what started torchrun can know not to try again.
"""

import contextlib
import difflib
import hashlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:  # what reads results on a laptop has no torch, and fails with our sentences all the same
    import torch

MISTAKE_FILE = "TORCHTUNE_KD_MISTAKE_FILE"
STORE_LIMIT = timedelta(seconds=3)  # for the launch's store to answer
CLEANUP_LIMIT = 20.0  # seconds that a process among several takes to clean up after an error


class UserError(ValueError):
    """A mistake in the config, the files or the launch. The message is one sentence: what, where, what to do."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that was set up well and cannot go on. The message is one sentence: what, where, what to do."""

    exit_code = 3


class Stopped(Exception):
    """A run that ended because a signal asked for it. The message is one sentence that says how to go on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


@contextlib.contextmanager
def report_errors() -> Iterator[contextlib.ExitStack]:
    """Clean up after the block, and say before that why it failed, since cleaning up may then wait or fail as well.

    Where several processes take part, one that fails is gone after :data:`CLEANUP_LIMIT` at the latest, so that its
    launcher can end or restart the others. :class:`Stopped` and a good end wait for as long as it takes.

    Yields:
        contextlib.ExitStack: takes what is to be called at the end, the last first.

    Raises:
        SystemExit: for an error that has a sentence, with its exit code.
    """
    with contextlib.ExitStack() as cleanup:
        try:
            yield cleanup
        except (Exception, KeyboardInterrupt) as error:
            code = _say(error)
            in_haste = _several_processes() and not isinstance(error, Stopped)
            if in_haste:
                if code is None:
                    traceback.print_exception(error)
                code = code or 1
                _exit_after(CLEANUP_LIMIT, code)
            try:
                cleanup.close()
            except Exception as another:
                print(f"(Cleaning up failed as well: {another!r})", file=sys.stderr, flush=True)
            if in_haste:  # what NCCL, gloo and loggers do at the interpreter's end may wait for other processes too
                sys.stdout.flush()
                os._exit(code)
            if code is None:
                raise
            raise SystemExit(code) from error


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """End the process with the sentence and the exit code of an error of the block that has one.

    Also a decorator of a main function.

    Raises:
        SystemExit: for such an error.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = _say(error)
        if code is None:
            raise
        raise SystemExit(code) from error


def _say(error: BaseException) -> int | None:
    """Print the sentence of ``error`` and return its exit code; None, and nothing printed, if it has none.

    A sentence that several processes of a launch have to say is printed by the first of them.
    """
    code = getattr(error, "exit_code", RunError.exit_code)
    if isinstance(error, (UserError, RunError)):
        said = f"error: {error}"
    elif isinstance(error, Stopped):
        said = f"stopped: {error}"
    elif isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
        said = "stopped: SIGINT came while nothing was being trained; start again with the same command."
    elif _memory_is_full(error):
        said = (
            "error: The memory of a device ran out outside of the steps' own phases: a smaller `batch_size`, more "
            "processes, or a LoRA builder as `model._component_` leave more of it; `tune run torchtune_kd/plan` with "
            f"this config shows what takes it. ({_shortened(error)})"
        )
    elif _a_process_is_missing(error):
        said = (
            "error: Another process of the run is gone, or this one waited for it for longer than "
            "`process_group_timeout`; its own output says why. Go on from the last checkpoint with "
            f"`resume_from_checkpoint=True`, which torchrun's --max_restarts does by itself. ({_shortened(error)})"
        )
    else:
        return None
    if isinstance(error, UserError) and os.environ.get(MISTAKE_FILE):
        _record_mistake(Path(os.environ[MISTAKE_FILE]), str(error))
    if not isinstance(error, (UserError, RunError, Stopped)) or _is_first_to_say(said):
        print(said, file=sys.stderr, flush=True)
    return code


def _record_mistake(path: Path, sentence: str) -> None:
    try:
        path.write_text(f"{sentence}\n", encoding="utf-8")
    except OSError as error:
        print(f"(The mistake could not be written into {path}: {error!r})", file=sys.stderr, flush=True)


def _is_first_to_say(sentence: str) -> bool:
    """Return whether no other process of this launch has said ``sentence``; True where they cannot be asked.

    They are asked by the store over which they meet: that of torchrun's agent, or else the first process's.
    """
    environment = os.environ
    has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or _several_processes()
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if environment.get("WORLD_SIZE", "1") == "1" or not (has_store and address and port):
        return True
    launch = (environment.get("TORCHELASTIC_RUN_ID"), environment.get("TORCHELASTIC_RESTART_COUNT"), sentence)
    import torch.distributed as dist

    try:
        store = dist.TCPStore(address, int(port), is_master=False, timeout=STORE_LIMIT, wait_for_workers=False)
        return store.add(f"torchtune_kd/said/{hashlib.sha256(repr(launch).encode()).hexdigest()}", 1) == 1
    except (RuntimeError, ValueError):  # it is gone together with the process that kept it
        return True


def _memory_is_full(error: BaseException) -> bool:
    """Recognise the allocator's error, or that of NCCL, which takes memory of its own."""
    import torch
    import torch.distributed as dist

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, dist.DistError) and "out of memory" in str(error).lower()
    )


def _a_process_is_missing(error: BaseException) -> bool:
    """Recognise what collectives raise then: NCCL's own type, gloo's a RuntimeError that names its source file."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _several_processes() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _exit_after(seconds: float, code: int) -> None:
    """End this process then, whatever its main thread waits for."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _shortened(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn a ValueError, ImportError or OSError of the block, which a tool's arguments led to, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        what = f"{error.filename} cannot be read or written" if error.filename else "a file cannot be read or written"
        reason = error.strerror or first_line(error)
        raise UserError(
            f"Expected files that can be read and written, but {what} ({reason}); check the path and its disk."
        ) from error
    except (ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise UserError(said.replace("pass overwrite=True", "pass --overwrite")) from error  # an option there


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something, without its full stop, to be quoted in a sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def nearest(key: str, known: Any) -> str:
    """Say what to do about a key that is not among the ``known`` ones: the end of a sentence."""
    close = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else "delete it or see `tune cp` for a config with every key."


def one_line(error: BaseException) -> str:
    """Return :func:`first_line` with a full stop, to end a sentence."""
    text = first_line(error)
    return text if text.endswith(("?", "!")) else f"{text}."


def say(sentence: str) -> None:
    """Print a line on stderr, past the progress bar."""
    tqdm.write(sentence, file=sys.stderr)


@contextlib.contextmanager
def loading(model: str, device: "torch.device") -> Iterator[None]:
    """End the run with a sentence where memory runs out in the block, in which ``model`` is built and loaded.

    There are no sizes yet to weigh settings by, as there are in a step; ``torchtune_kd/plan`` has them.

    Raises:
        RunError: for memory that runs out.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"The memory of {device} ran out while loading the {model}, before the first step: `dtype: bf16`, a QLoRA "
            "builder as `model._component_`, more processes that share the weights or `fsdp_cpu_offload: True` take "
            "less of it; `tune run torchtune_kd/plan` with this config shows what each part takes. "
            f"({_shortened(error)})"
        ) from error


class OutOfMemory(Exception):
    """The device's memory is full. ``phase``: "teacher", "student forward", "loss", "backward" or "optimizer"."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase)
        self.phase = phase


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Say of memory that runs out in the block that it ran out in ``name``."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(name) from error
