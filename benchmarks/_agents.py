"""torchrun agents that meet as on several hosts: on loopback, or each in a network namespace of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """Where an agent runs: ``prefix`` goes before its command, ``address`` and ``interface`` are those it speaks on."""

    address: str = "127.0.0.1"
    interface: str = "lo"
    prefix: tuple[str, ...] = ()


LOOPBACK = Host()


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def start_agent(
    command: Sequence[str],
    *,
    node: int,
    nodes: int,
    processes: int,
    endpoint: str,
    host: Host = LOOPBACK,
    launcher: Sequence[str] = (sys.executable, "-m", "torch.distributed.run"),
    options: Sequence[str] = (),
    log: Path | None = None,
) -> subprocess.Popen:
    """Start the agent of one node; it becomes the leader of a process group of its own, so that it can be killed whole.

    Args:
        command (Sequence[str]): what each of its workers runs: a file or ``-m module``, and arguments.
        node (int): 0 for the node that holds the rendezvous.
        nodes (int): how many agents there will be.
        processes (int): workers of this agent.
        endpoint (str): ``address:port`` of the rendezvous.
        host (Host): where it runs.
        launcher (Sequence[str]): torchrun, or ``tune run``.
        options (Sequence[str]): more options of torchrun.
        log (Path | None): file for what agent and workers print; None: it is piped.
    """
    # The last: an agent that is started anew asks for the master's address, which the others keep to themselves if
    # agents and workers share a store (https://github.com/pytorch/pytorch/issues/135712).
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": host.interface,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    arguments = ["--nnodes", str(nodes), "--nproc_per_node", str(processes), "--node_rank", str(node)]
    arguments += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "kd"]
    arguments += ["--rdzv_conf", f"is_host={int(node == 0)}", "--local_addr", host.address]
    output = log.open("w") if log is not None else subprocess.PIPE
    return subprocess.Popen(
        [*host.prefix, *launcher, *arguments, *options, *command],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_agents(command: Sequence[str], *, nodes: int, processes: int, timeout: float = 600) -> None:
    """Run ``command`` on ``nodes`` agents of ``processes`` workers each, all on loopback, and wait for them.

    Raises:
        RuntimeError: with the end of the output, if one fails.
    """
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [
        start_agent(command, node=node, nodes=nodes, processes=processes, endpoint=endpoint) for node in range(nodes)
    ]
    try:
        outputs = [agent.communicate(timeout=timeout)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    for agent, output in zip(agents, outputs, strict=True):
        if agent.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {agent.returncode}:\n{output[-4000:]}")
