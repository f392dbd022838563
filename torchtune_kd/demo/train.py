"""Run the recipe as a user would, by ``tune run``, and read what it logged."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.demo.output import DemoError

TRAINING, CACHING = "torchtune_kd/kd_single_device", "torchtune_kd/cache_teacher"
CONFIG = "torchtune_kd/smollm2/135M_to_15L_KD_full_single_device"

_ERASED = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]")  # terminal control sequences
_SECONDS_TO_STOP = 10


def read_config(overrides: Sequence[str]) -> DictConfig:
    """Read the demo's config with ``key=value`` overrides, as the recipe will see it."""
    package, _, name = CONFIG.partition("/")
    text = files(f"{package}.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(list(overrides)))


def tune_command(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Return the command line of ``tune run`` in the environment that this interpreter belongs to."""
    tune = shutil.which("tune", path=str(Path(sys.executable).parent))
    door = [tune] if tune else [sys.executable, "-m", "torchtune_kd"]  # the same command line
    return [*door, "run", recipe, "--config", CONFIG, *overrides]


def run_recipe(command: Sequence[str], log: Path) -> None:
    """Run a command of :func:`tune_command`; show its progress bar, and keep all that it says in ``log``.

    Raises:
        DemoError: with the command's exit code if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="torchtune_kd_") as cache, log.open("wb", buffering=0) as file:
        environment = os.environ | {
            "HF_DATASETS_CACHE": cache,  # each run's text is another: the user's cache would only grow
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "1",  # nothing is needed from it
            "COLUMNS": str(shutil.get_terminal_size().columns),
            "PYTHONUNBUFFERED": "1",
        }
        # a session of its own: Ctrl-C reaches this process alone, which then ends the other
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            _show_progress(process, file)
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if code:
        last = next((line for line in reversed(_lines(log)) if line.strip()), "it said nothing")
        raise DemoError(f"tune run ended with exit code {code} ({last.strip()}); see {log} for all it said.", abs(code))


def _show_progress(process: subprocess.Popen, file) -> None:
    """Copy everything to ``file`` and, from the progress bar's first sign on, to this process's output."""
    showing = False
    while chunk := os.read(process.stdout.fileno(), 65536):
        file.write(chunk)
        if not showing and b"\r" in chunk:
            showing, chunk = True, chunk[chunk.index(b"\r") :]
        if showing:
            sys.stdout.write(chunk.decode(errors="replace"))
            sys.stdout.flush()


def _lines(log: Path) -> list[str]:
    text = _ERASED.sub(b"", log.read_bytes()).decode(errors="replace")
    return text.replace("\r", "\n").splitlines()


def _stop(process: subprocess.Popen) -> None:
    """End the process and whatever it started, and wait until it is gone."""
    if process.poll() is not None:
        return
    for kind in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, kind)
        try:
            process.wait(_SECONDS_TO_STOP)
            return
        except subprocess.TimeoutExpired:
            continue
