"""The same tokens on 1, 2, 3 processes and 2 nodes of 1 and of 2, sharded over all or in a node: the same numbers."""

from pathlib import Path

import pytest
import torch

import torchtune_kd
from helpers.checkout import benchmarks

topologies = benchmarks("topologies")


@pytest.mark.slow
@pytest.mark.parametrize(
    "students",
    [
        ("full",),
        pytest.param(("dora", "qlora"), marks=pytest.mark.nightly),  # LoRA is what DoRA and QLoRA add to
    ],
)
def test_every_topology_gives_the_numbers_of_one_process(students):
    """fp32, ten steps, unequal numbers of valid tokens per rank, a rank without any among them."""
    rows = topologies.compare(students)
    seen = {(row.topology, row.replicate_dim, row.student) for row in rows}
    for topology in topologies.TOPOLOGIES:
        for student in {*students} - {"qlora"}:
            assert {(topology.name, r, student) for r in topology.replicate_dims} <= seen
    if "qlora" in students:  # NF4 does not divide by every number of processes
        assert {("2 processes", 1, "qlora"), ("2 nodes x 2", 1, "qlora"), ("2 nodes x 2", 2, "qlora")} <= seen
    for row in rows:
        assert row.loss <= 1e-5, row
        assert row.grad_norm <= 1e-5, row
        assert row.weights <= 1e-4, row  # of the way that ten steps of AdamW moved them


def test_the_table_has_a_line_per_topology_and_the_documented_layout():
    rows = [
        topologies.Row("1 process", 1, "full", 0, 0, 0),
        topologies.Row("1 process", 1, "qlora", 0, 0, 0),
        topologies.Row("3 processes", 1, "full", 1.6e-7, 2e-6, 7.4e-6),
        topologies.Row("2 nodes x 2", 2, "full", 1e-7, 2e-7, 3e-7),
        topologies.Row("2 nodes x 2", 2, "qlora", 4e-7, 5e-7, 6e-7),
    ]
    head, _, *lines = topologies.table(rows).splitlines()
    assert head == "| topology | copies | full | qlora |"
    assert lines == [
        "| 3 processes | 1 | 2e-07, 2e-06, 7e-06 | – |",
        "| 2 nodes x 2 | 2 | 1e-07, 2e-07, 3e-07 | 4e-07, 5e-07, 6e-07 |",
    ]
    readme = (Path(torchtune_kd.__file__).parent / "launch" / "README.md").read_text()
    assert "| topology | copies | " + " | ".join(topologies.STUDENTS) + " |" in readme
    for topology in topologies.TOPOLOGIES[1:]:
        for copies in topology.replicate_dims:
            assert f"\n| {topology.name} | {copies} | " in readme


def test_the_tokens_of_a_step_do_not_depend_on_the_number_of_processes():
    """And they are as unequal as the test above says."""
    batches = benchmarks("_topologies_worker").batches
    whole = batches(3, 0, 1, -100)
    rows = torch.cat([batch.labels for batch in whole])
    for size in (2, 3, 4):
        parts = [batches(3, rank, size, -100) for rank in range(size)]
        assert torch.equal(torch.cat([batch.labels for part in parts for batch in part]), rows)
        counts = [sum(int((batch.labels != -100).sum()) for batch in part) for part in parts]
        assert len(set(counts)) == size
        assert int((parts[-1][-1].labels != -100).sum()) == 0  # the last microbatch of the last rank
    assert counts[-1] == 0  # of four ranks the last has no valid token at all
