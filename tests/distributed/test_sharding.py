"""What travels between processes and nodes, in which order, and what loading takes: real processes, gloo."""

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.checkout import benchmarks
from helpers.tiny import TEACHER, make_config, model_section, write_checkpoint

WORKER = Path(__file__).with_name("sharding_worker.py")


def run_worker(folder: Path, cfg, *, nodes: int, processes: int) -> list[dict]:
    """Run the worker and return what each rank wrote."""
    OmegaConf.save(cfg, folder / "config.yaml")
    command = [str(WORKER), str(folder / "config.yaml"), str(folder)]
    benchmarks("_agents").run_agents(command, nodes=nodes, processes=processes, timeout=300)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(nodes * processes)]


def count(result: dict, operation: str, group: str) -> int:
    return sum(n for name, n in result["collectives"].items() if operation in name and name.endswith(group))


@pytest.mark.slow
@pytest.mark.parametrize("kind, reshard", [("full", True), ("full", False), ("lora", True)])
def test_gradients_are_reduced_once_per_step_and_heads_gathered_once(tmp_path, kind, reshard):
    """Three microbatches: one reduce-scatter per FSDP group that trains, in the last backward alone."""
    cfg = make_config(tmp_path, kind, fsdp_reshard_after_forward=reshard)
    for result in run_worker(tmp_path, cfg, nodes=1, processes=2):
        # of an adapted student nothing but the layer trains
        assert count(result, "reduce_scatter", "dp_shard") == (2 if kind == "full" else 1), result
        gathered = count(result, "allgather", "dp_shard")
        if reshard:
            # student: the rest (its head, trained or frozen) once, its layer in forward and backward of 3 microbatches;
            # teacher: the rest once, its 2 layers in the forward of 3 microbatches
            assert gathered == (1 + 1 * 2 * 3) + (1 + 2 * 3), result
        else:  # every group once
            assert gathered == (1 + 1) + (1 + 2), result


@pytest.mark.slow
def test_two_nodes_with_hybrid_sharding(tmp_path):
    """2 nodes of 2 processes: across nodes gradients alone; one process of a node reads; layers are asked for early."""
    cfg = make_config(tmp_path, data_parallel_replicate_dim=2)
    # a teacher of 160 MiB in fp32, most of it in layers, so that what loading takes stands out
    large = TEACHER | {"num_layers": 8, "embed_dim": 512, "intermediate_dim": 2560}
    cfg.teacher_model = model_section("full", large, tied=False)
    cfg.teacher_checkpointer.checkpoint_dir = str(write_checkpoint(tmp_path / "large", cfg.teacher_model, seed=1))
    file = tmp_path / "large" / "model.safetensors"
    results = run_worker(tmp_path, cfg, nodes=2, processes=2)

    for result in results:
        # the student's two groups, once per step
        across = {name: n for name, n in result["collectives"].items() if name.endswith("dp_replicate")}
        assert sum(across.values()) == count(result, "allreduce", "dp_replicate") == 2, result
        assert count(result, "allgather", "dp_shard") == (1 + 1 * 2 * 3) + (1 + 8 * 3), result
        # the first microbatch: the rest and the first layer, then always one more than is computed
        expected = ["gather"] * 2
        for layer in range(8):
            expected += [*(["gather"] if layer < 7 else []), f"compute {layer}"]
        assert result["order"][: len(expected)] == expected

    assert [result["maps_files"] for result in results] == [True, False, True, False]
    assert {result["node_size"] for result in results} == {2}
    whole, largest = file.stat().st_size, 4 * 512 * 2560
    permuted = 8 * 4 * (512 * 512 + 512 * 256)  # torchtune turns q and k around when it reads them
    slack = 48 * 2**20  # modules imported meanwhile, buffers of gloo; a copy of the file would take three times that
    assert math.isclose(whole / 2**20, 160, rel_tol=0.1)
    for result in results:
        reader = permuted if result["maps_files"] else 0
        assert whole / 2 < result["peak"] < whole / 2 + 2 * largest + reader + slack, result["peak"]
