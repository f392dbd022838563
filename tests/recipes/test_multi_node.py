"""Two nodes for real: two torchrun agents with a rendezvous, in network namespaces of their own where that is allowed.

A node's end is SIGKILL to its agent and its workers.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from helpers.checkout import benchmarks
from helpers.forked import ForkedRun
from helpers.resumable import resumable_config, weights_of
from helpers.tiny import ROWS, make_config, read_log
from torchtune_kd.checkpoints.folders import step_folders

agents = benchmarks("_agents")
pytestmark = pytest.mark.slow

A_MINUTE = 60
NUMBERS = ("loss", "grad_norm", "kl", "lr")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list]:
    """Two hosts joined by a cable, or, where this machine lets nobody lay one, two that are this machine."""
    names = [f"kd-{os.getpid()}-{node}" for node in range(2)]
    ends = [f"kd{os.getpid()}{end}"[-15:] for end in "ab"]
    addresses = ["10.213.77.1", "10.213.77.2"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    with contextlib.ExitStack() as undo:
        try:
            for name in names:
                ip("netns", "add", name)
                undo.callback(ip, "netns", "del", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip(names, ends, addresses, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):  # no iproute2, no right to use it, or no such kernel module
            yield [agents.LOOPBACK, agents.LOOPBACK]
            return
        yield [
            agents.Host(address, end, ("ip", "netns", "exec", name))
            for name, end, address in zip(names, ends, addresses, strict=True)
        ]


class Nodes:
    """Agents of ``kd_distributed`` on ``hosts``, one worker each."""

    def __init__(self, cfg: DictConfig, hosts: list, *, max_restarts: int = 0) -> None:
        self._hosts, self._max_restarts = hosts, max_restarts
        self._folder = Path(cfg.output_dir).parent
        self._config = self._folder / f"{Path(cfg.output_dir).name}.yaml"
        OmegaConf.save(cfg, self._config)
        self._endpoint = f"{hosts[0].address}:{agents.free_port()}"
        self._count = itertools.count()
        self.agents: dict[int, subprocess.Popen] = {}
        self.logs: dict[int, Path] = {}

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.agents:
            self.kill(node)

    def start(self, *nodes: int) -> None:
        for node in nodes:
            self.logs[node] = self._folder / f"agent_{node}_{next(self._count)}.log"
            self.agents[node] = agents.start_agent(
                ["torchtune_kd/kd_distributed", "--config", str(self._config)],
                node=node,
                nodes=2,
                processes=1,
                endpoint=self._endpoint,
                host=self._hosts[node],
                launcher=(str(Path(sys.executable).parent / "tune"), "run"),
                options=["--max_restarts", str(self._max_restarts)],
                log=self.logs[node],
            )

    def workers(self, node: int) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.agents[node].pid).children(recursive=True)
        return []

    def kill(self, node: int) -> None:
        """The node is gone: its workers have no time to say so."""
        for process in [*self.workers(node), self.agents[node]]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.agents[node].wait()

    def wait(self, what: Callable[[], bool], timeout: float = 120) -> float:
        """Until ``what`` is so; the seconds it took."""
        start = time.monotonic()
        while not what():
            if time.monotonic() - start > timeout:
                raise AssertionError(f"not so after {timeout} s:\n{self.output()}")
            time.sleep(0.05)
        return time.monotonic() - start

    def ended(self) -> bool:
        return all(agent.poll() is not None for agent in self.agents.values())

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs.values())


def config(folder: Path, name: str, **more) -> DictConfig:
    """60 steps, a checkpoint every tenth; a copy of the weights per node."""
    return make_config(
        folder,
        rows=ROWS * 10,
        output_dir=str(folder / name),
        batch_size=2,
        data_parallel_replicate_dim=2,
        save_every_n_steps=10,
        resume_from_checkpoint=True,
        **more,
    )


def has_reached(cfg: DictConfig, step: int) -> bool:
    """Return whether a checkpoint of ``step`` or later is there."""
    return any(int(folder.name.removeprefix("step_")) >= step for folder in step_folders(Path(cfg.output_dir)))


@pytest.mark.nightly
def test_what_is_killed_and_restarted_in_the_middle_changes_no_number(tmp_path, hosts):
    """First a worker, whom its agent restarts, and so does the other agent with its own; then a whole node.

    The other node's agent restarts its worker and waits; when the node is back they go on from the last checkpoint.
    """
    undisturbed, disturbed = (config(tmp_path, name) for name in ("undisturbed", "disturbed"))
    with Nodes(undisturbed, [agents.LOOPBACK] * 2) as nodes:
        nodes.start(0, 1)
        nodes.wait(nodes.ended)
        assert [agent.returncode for agent in nodes.agents.values()] == [0, 0], nodes.output()
    with Nodes(disturbed, hosts, max_restarts=3) as nodes:
        nodes.start(0, 1)
        nodes.wait(lambda: has_reached(disturbed, 10))
        (worker,) = nodes.workers(1)
        worker.kill()
        nodes.wait(lambda: has_reached(disturbed, 30))
        assert "Going on with" in nodes.output()
        (survivor,) = nodes.workers(0)
        nodes.kill(1)
        assert nodes.wait(lambda: not survivor.is_running()) < A_MINUTE
        assert not (tmp_path / "disturbed" / "epoch_0").exists()
        nodes.start(1)
        nodes.wait(nodes.ended)
        assert [agent.returncode for agent in nodes.agents.values()] == [0, 0], nodes.output()
        assert nodes.output().count("Going on with") >= 2

    logs = [{step["step"]: step for step in read_log(cfg.output_dir)} for cfg in (undisturbed, disturbed)]
    assert logs[0].keys() == logs[1].keys() == set(range(1, 61))
    for step, numbers in logs[0].items():
        assert {name: logs[1][step][name] for name in NUMBERS} == {name: numbers[name] for name in NUMBERS}
    weights = [
        load_file(next((tmp_path / name / "epoch_0").glob("model-*.safetensors")))
        for name in ("undisturbed", "disturbed")
    ]
    for name, weight in weights[0].items():
        assert weight.equal(weights[1][name]), name


def test_every_rank_ends_within_a_minute_when_the_rendezvous_is_gone(tmp_path, hosts):
    """Node 0 holds the store at which all agents meet: nothing can be restarted, and nothing may hang."""
    cfg = config(tmp_path, "out", epochs=50)
    with Nodes(cfg, hosts, max_restarts=3) as nodes:
        nodes.start(0, 1)
        nodes.wait(lambda: has_reached(cfg, 10))
        workers = nodes.workers(1)
        nodes.kill(0)
        assert nodes.wait(nodes.ended, timeout=A_MINUTE) < A_MINUTE
        assert nodes.agents[1].returncode != 0
        assert not [worker for worker in workers if worker.is_running()]


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_a_checkpoint_of_copies_goes_on_without_them(tmp_path, kind):
    """Two copies of the weights over two processes each, then two processes that share one: 12 rows a step for both."""
    options = {"epochs": 3, "optimizer__lr": 1e-4, "batch_size": 12, "run_val_every_n_steps": None}
    undisturbed = resumable_config(tmp_path, kind, output_dir=str(tmp_path / "undisturbed"), **options)
    moved = resumable_config(tmp_path, kind, output_dir=str(tmp_path / "moved"), **options)
    if kind == "qlora":  # no dropout: every process draws its own
        undisturbed.model.lora_dropout = moved.model.lora_dropout = 0.0
    ForkedRun(undisturbed).finish()

    moved.batch_size = 3
    copies = ForkedRun(OmegaConf.merge(moved, {"data_parallel_replicate_dim": 2}), 4)
    assert copies.wait_for("step", 4)
    copies.kill()
    moved.batch_size = 6
    assert "Going on with" in ForkedRun(OmegaConf.merge(moved, {"resume_from_checkpoint": True}), 2).finish()
    for step, other in zip(read_log(moved.output_dir), read_log(undisturbed.output_dir), strict=True):
        for name in other.keys() & {"loss", "grad_norm", "lr", "val_loss"}:
            assert step[name] == pytest.approx(other[name], rel=1e-5), (step["step"], name)
    for name, weight in weights_of(undisturbed, 2).items():
        torch.testing.assert_close(weights_of(moved, 2)[name], weight, rtol=0, atol=1e-5)
