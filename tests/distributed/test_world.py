"""How processes are laid out, and what one alone does."""

import pytest
import torch
from torch.torch_version import TorchVersion

from helpers.tiny import STUDENT, make_config, model_section
from torchtune_kd.config.sections import section_of
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import describe_layout, join_process_group, mesh_shape
from torchtune_kd.models.build import on_meta
from torchtune_kd.training import UserError, World, read_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "size, replicate_dim, shard_dim, shape",
    [(8, 1, -1, (8,)), (8, 1, 8, (8,)), (8, 2, -1, (2, 4)), (8, 2, 4, (2, 4)), (2, 2, -1, (2, 1)), (1, 1, -1, (1,))],
)
def test_the_mesh_has_a_second_dimension_for_copies(size, replicate_dim, shard_dim, shape):
    assert mesh_shape(size, replicate_dim, shard_dim) == shape


@pytest.mark.parametrize("size, replicate_dim, shard_dim", [(8, 3, -1), (8, 2, 2), (8, 1, 4), (2, 4, -1)])
def test_processes_that_do_not_divide_are_refused(monkeypatch, size, replicate_dim, shard_dim):
    """Before anybody waits for anybody."""
    for name, value in {"RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": "nowhere", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=f"the number of processes, {size}, got {replicate_dim} x {shard_dim}: "):
        dims = {"data_parallel_replicate_dim": replicate_dim, "data_parallel_shard_dim": shard_dim}
        join_process_group(Settings(output_dir="", device="cpu", **dims))


def test_fsdp2_on_a_cpu_needs_a_pytorch_that_can(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "nowhere", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cpu"))
    with pytest.raises(UserError, match=r"^Expected PyTorch 2.7 or later .*2\.6\.0\+cpu fails: install a later one"):
        join_process_group(Settings(output_dir="", device="cpu"))


@pytest.mark.parametrize(
    "key, value", [("data_parallel_replicate_dim", 0), ("data_parallel_shard_dim", 0), ("process_group_timeout", 0)]
)
def test_settings_out_of_range_are_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=f"Expected `{key}` to be at least 1.*, got 0: change it"):
        read_config(make_config(tmp_path, **{key: value}), distributed=True)
    with pytest.raises(UserError, match=f"`{key}` belongs to kd_distributed"):
        read_config(make_config(tmp_path, **{key: value}), distributed=False)


@pytest.mark.parametrize(
    "nodes, shards, expected",
    [
        (
            "0011",
            2,
            "4 processes on 2 nodes, copies of the weights: 2, each over 2 processes of one node: across nodes "
            "gradients travel, once per step.",
        ),
        (
            "0011",
            4,
            "4 processes on 2 nodes, copies of the weights: 1, each over 4 processes of several nodes: across nodes "
            "the weights of every layer travel; with data_parallel_replicate_dim=2 gradients alone would, once per "
            "step.",
        ),
        (
            "001",  # nodes of unequal size have no hybrid sharding
            3,
            "3 processes on 2 nodes, copies of the weights: 1, each over 3 processes of several nodes: across nodes "
            "the weights of every layer travel.",
        ),
    ],
)
def test_the_layout_says_what_travels_between_nodes(nodes, shards, expected):
    assert describe_layout(nodes, shards) == expected


def test_one_process_has_everything_itself():
    world = World(CPU)
    assert (world.num_shards, world.reads_files, world.is_rank_zero) == (1, True, True)
    assert world.gather("x") == ["x"]
    assert world.first("x") == "x" and world.first(None) is None
    assert world.share_in_node(torch.arange(3)).tolist() == [0, 1, 2]
    world.barrier()
    world.set_timeout(1)


def test_nf4_weights_that_nobody_shares_are_refused(tmp_path):
    """FSDP2 skips the gather of a single shard, and with it what NF4 needs."""
    section = section_of("model", model_section("qlora", STUDENT))
    settings = read_config(make_config(tmp_path, "qlora"), distributed=True).settings
    on_meta(section, settings, World(CPU, size=2, sharded=True))
    with pytest.raises(UserError, match="`model` is quantised, and FSDP2 shards NF4 weights over two processes"):
        on_meta(section, settings, World(CPU, size=1, sharded=True))
