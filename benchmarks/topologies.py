"""The same tokens on every topology: ``python -m benchmarks.topologies [STUDENT ...]`` prints what differs.

Each topology is started by real torchrun agents (several "nodes" meet on loopback) and trains ten fp32 steps with AdamW
on the same rows, which have unequal numbers of valid tokens and some none. What is printed are the largest relative
differences from one process (for QLoRA, which FSDP2 cannot hold on one, from the single-device recipe's steps): of the
losses and of the gradient norms over the ten steps, and of the trained weights after them, ||w - w1|| over the distance
||w1 - w0|| that one process moved them. "copies" above 1 is hybrid sharding.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ._agents import run_agents
from ._measure import describe_machine

WORKER = Path(__file__).with_name("_topologies_worker.py")
STUDENTS = ("full", "lora", "dora", "qlora")


class Topology(NamedTuple):
    """``replicate_dims``: 1 is FSDP over all processes; more is hybrid sharding with as many copies of the weights."""

    name: str
    nodes: int
    processes: int
    replicate_dims: tuple[int, ...]


TOPOLOGIES = (
    Topology("1 process", 1, 1, (1,)),
    Topology("2 processes", 1, 2, (1,)),
    Topology("3 processes", 1, 3, (1,)),
    Topology("2 nodes x 1", 2, 1, (1, 2)),
    Topology("2 nodes x 2", 2, 2, (1, 2)),
)


class Row(NamedTuple):
    """Largest relative differences from one process."""

    topology: str
    replicate_dim: int
    student: str
    loss: float
    grad_norm: float
    weights: float


def compare(students: Sequence[str] = STUDENTS, topologies: Sequence[Topology] = TOPOLOGIES) -> list[Row]:
    """Run every topology for every student; ``topologies`` begins with one process, the reference."""
    rows, reference = [], {}
    for topology in topologies:
        for (replicate_dim, student), result in _run(topology, students).items():
            if topology is topologies[0]:
                reference[student] = result
            rows.append(_row(topology, replicate_dim, student, result, reference[student]))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per topology but the reference, a column per student: loss, gradient norm, weights."""
    students = list(dict.fromkeys(row.student for row in rows))
    cells = {(row.topology, row.replicate_dim, row.student): row for row in rows}
    lines = [f"| topology | copies | {' | '.join(students)} |"]
    lines.append("|---" * (2 + len(students)) + "|")
    for topology, copies in dict.fromkeys((row.topology, row.replicate_dim) for row in rows):
        if topology == rows[0].topology:
            continue
        found = [cells.get((topology, copies, student)) for student in students]
        numbers = ["–" if r is None else f"{r.loss:.0e}, {r.grad_norm:.0e}, {r.weights:.0e}" for r in found]
        lines.append(f"| {topology} | {copies} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _run(topology: Topology, students: Sequence[str]) -> dict[tuple[int, str], dict[str, Tensor]]:
    runs = [(r, s) for r in topology.replicate_dims for s in students if s != "qlora" or _holds_nf4(topology, r)]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(WORKER), folder, *(f"{student}:{replicate_dim}" for replicate_dim, student in runs)]
        run_agents(command, nodes=topology.nodes, processes=topology.processes)
        return {(r, s): load_file(Path(folder) / f"{s}-{r}.safetensors") for r, s in runs}


def _holds_nf4(topology: Topology, replicate_dim: int) -> bool:
    """Whole blocks on every rank: the worker's 256 rows divide by 2 and 4; one process is the single-device world."""
    size = topology.nodes * topology.processes
    return size == 1 or size // replicate_dim in (2, 4)


def _row(
    topology: Topology, replicate_dim: int, student: str, result: dict[str, Tensor], reference: dict[str, Tensor]
) -> Row:
    def largest(name: str) -> float:
        return float(((result[name] - reference[name]) / reference[name]).abs().max())

    return Row(topology.name, replicate_dim, student, largest("loss"), largest("grad_norm"), _moved(result, reference))


def _moved(result: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    trained = [name for name in reference if name.startswith("start.")]
    apart, way = 0.0, 0.0
    for name in trained:
        end = name.replace("start.", "weights.")
        apart += float((result[end] - reference[end]).double().square().sum())
        way += float((reference[end] - reference[name]).double().square().sum())
    return (apart / way) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topologies", description=__doc__)
    parser.add_argument("students", nargs="*", default=STUDENTS, metavar="STUDENT", help=", ".join(STUDENTS))
    students = parser.parse_args().students
    if unknown := set(students) - set(STUDENTS):
        parser.error(f"expected students out of {', '.join(STUDENTS)}, got {', '.join(sorted(unknown))}")
    print(f"{table(compare(students))}\n\n{describe_machine()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
