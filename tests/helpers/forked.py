"""Runs of the recipes in processes of their own that cost no import: forked from a server that has torch loaded.

A run on several processes forks one for each rank; they meet in a file. What a run is doing can be followed from
outside (:meth:`ForkedRun.wait_for`), so that a test can send a signal in the middle of it.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from torchtune_kd.training.events import EVENTS

RECIPE = "torchtune_kd.recipes.kd"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "datasets", RECIPE])


def needs_fsdp2_on_a_cpu() -> None:
    """Skip the test where PyTorch cannot shard models on a CPU."""
    if torch.__version__ < "2.7":
        import pytest  # here, since every forked process imports this module

        pytest.skip(f"FSDP2 on a CPU needs PyTorch 2.7, this is {torch.__version__}")


class ForkedRun:
    """One run of ``cfg`` on ``size`` processes, started at once, with what each prints in files.

    Args:
        cfg (DictConfig): the config.
        size (int): processes.
        recipe (str): the module that every process runs.
        distributed (bool | None): whether they form a process group; None: where there are several.
        hold (tuple[str, int] | None): an event, and the how many-th of it; rank 0's main thread sleeps there.
    """

    def __init__(
        self,
        cfg: DictConfig,
        size: int = 1,
        recipe: str = RECIPE,
        hold: tuple[str, int] | None = None,
        distributed: bool | None = None,
    ) -> None:
        distributed = size > 1 if distributed is None else distributed
        if distributed:
            needs_fsdp2_on_a_cpu()
        folder = Path(cfg.output_dir).parent
        name = f"{Path(cfg.output_dir).name}_{time.monotonic_ns()}"
        self._config, self._store = folder / f"{name}.yaml", folder / f"{name}.store"
        self._outputs = [folder / f"{name}_{rank}.txt" for rank in range(size)]
        OmegaConf.save(cfg, self._config)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._events, sender = _context.Pipe(duplex=False)
        self._woken = _context.Event()
        self.processes = []
        for rank in range(size):
            arguments = (
                recipe,
                str(self._config),
                rank,
                size,
                str(self._store) if distributed else None,
                str(self._outputs[rank]),
                sender,
                hold,
                self._woken,
            )
            process = _context.Process(target=_main, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)
        sender.close()  # so that the end of rank 0 is seen as the end of the events

    def wait_for(self, event: str, count: int = 1, timeout: float = 60) -> bool:
        """Until ``event`` has begun ``count`` times from now on; False if the run ended before."""
        with contextlib.suppress(EOFError):
            while count:
                if not self._events.poll(timeout):
                    raise AssertionError(f"no {event} in {timeout} s:\n{self.output()}")
                count -= self._events.recv() == event
            return True
        return False

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.join()

    def send(self, number: int, ranks: Any = None) -> None:
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def wake(self) -> None:
        """End the sleep that ``hold`` asked for."""
        self._woken.set()

    def join(self, timeout: float = 120) -> list[int]:
        """The exit codes, negative for a signal, as soon as all processes have ended."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                for other in self.processes:
                    other.kill()
                raise AssertionError(f"still running after {timeout} s:\n{self.output()}")
        self._store.unlink(missing_ok=True)
        return [process.exitcode for process in self.processes]

    def output(self, rank: int = 0) -> str:
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def finish(self) -> str:
        """The output of a run that ends well."""
        codes = self.join()
        assert codes == [0] * len(codes), self.output()[-4000:]
        return self.output()


def _main(
    recipe: str, config: str, rank: int, size: int, store: str | None, output: str, events: Any, hold: Any, woken: Any
) -> None:
    import torch.distributed as dist

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if rank != 0:
        events.close()
    if store is not None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "", "MASTER_PORT": ""}
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    sys.argv = [recipe, "--config", config]
    module = __import__(recipe, fromlist=["recipe_main"])
    if rank == 0 and recipe == RECIPE:
        module.KDRecipe = _announcing(module.KDRecipe, events, hold, woken)
    sys.exit(module.recipe_main())


def _announcing(recipe_class: Any, events: Any, hold: tuple[str, int] | None, woken: Any) -> Any:
    """The recipe, which sends a word at every event of its run and sleeps at the one to ``hold``."""

    class Announcing(recipe_class):
        def setup(self) -> None:
            super().setup()
            for event in EVENTS:
                self._run.on(event, functools.partial(tell, event, itertools.count(1)))

    def tell(event: str, numbers: Any) -> None:
        events.send(event)
        if (event, next(numbers)) == hold:
            woken.wait(600)

    return Announcing
