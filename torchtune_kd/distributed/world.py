"""The processes that take part in a run: how they are laid out, what they add up, how long they wait."""

import contextlib
import gc
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # has no public name; torchtitan takes it too
from torchtune import training, utils

from torchtune_kd.config.reading import started_by_launcher
from torchtune_kd.config.settings import Settings
from torchtune_kd.errors import UserError

# What a process waits for another while that one downloads, packs a dataset, reads or writes a checkpoint, compiles.
SETUP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """One process among ``size``. ``sharded`` says whether models are sharded over the processes with FSDP2.

    ``mesh`` has the dimension ``dp_shard``, over which weights are sharded, and, for hybrid sharding, before it
    ``dp_replicate``, over which they are copies. ``node_group`` are the processes of this node, its reader first.
    ``host_group`` are all processes, over gloo and with :data:`SETUP_TIMEOUT`: for whatever is no part of a step.
    ``step_group`` are all of them over gloo without patience: for what the hosts agree on within a step.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    sharded: bool = False
    mesh: DeviceMesh | None = None
    node_group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None
    step_group: dist.ProcessGroup | None = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def num_shards(self) -> int:
        """Return how many processes share one copy of the weights."""
        if not self.sharded:
            return 1
        return self.size if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    @property
    def reads_files(self) -> bool:
        """Return whether this is the one process of its node that reads checkpoints."""
        return self.node_group is None or dist.get_rank(self.node_group) == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor``, which is on ``self.device``, elementwise over all processes."""
        tensor = tensor.clone()
        if self.sharded:
            dist.all_reduce(tensor)
        return tensor

    def any(self, value: bool) -> bool:
        """Return whether ``value`` is true on any process; nobody waits for a device."""
        if not self.sharded:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.step_group)
        return bool(flag)

    def barrier(self) -> None:
        """Wait, with patience, until every process is here."""
        if self.sharded:
            dist.barrier(group=self.host_group)

    def gather(self, value: Any) -> list[Any]:
        """Gather every process's ``value`` (anything that pickles) in rank order, within :data:`SETUP_TIMEOUT`."""
        if not self.sharded:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def first(self, value: Any) -> Any:
        """Return, on all processes, the first process's ``value`` that is not None; None if there is none."""
        return next((found for found in self.gather(value) if found is not None), None)

    def share_in_node(self, tensor: Tensor) -> Tensor:
        """Send the reader's ``tensor`` to the device of every process of its node.

        Only the reader's values count; elsewhere a meta tensor of the same shape and dtype will do.
        """
        if tensor.is_meta or not self.reads_files:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        else:
            whole = tensor.to(self.device).contiguous()
        if self.node_group is not None:
            dist.broadcast(whole, dist.get_global_rank(self.node_group, 0), group=self.node_group)
        return whole

    def set_timeout(self, seconds: float) -> None:
        """Let a process that waits longer than ``seconds`` for another within a step end with an error from now on.

        To be called when all are set up, or, where models are compiled, after the first step: until then processes
        wait for downloads, files and compilers.
        """
        if not self.sharded:
            return
        _set_pg_timeout(timedelta(seconds=seconds))
        for group in (*self.mesh.get_all_groups(), self.step_group):
            _set_pg_timeout(timedelta(seconds=seconds), group)

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Let rank 0 go through the block alone, then the others: for downloads and caches that it fills."""
        if not self.is_rank_zero:
            self.barrier()
        yield
        if self.is_rank_zero:
            self.barrier()


def join_world(settings: Settings) -> World:
    """Return the world of a process: of its own, or that which a launcher prepared.

    Raises:
        UserError: as :func:`join_process_group`.
    """
    if not started_by_launcher() and "torchtune_kd/kd_distributed" not in sys.orig_argv:
        return World(device=_device(settings.device))
    return join_process_group(settings)


def join_process_group(settings: Settings) -> World:
    """Join the process group that the launcher prepared: NCCL on CUDA, gloo on the CPU.

    Raises:
        UserError: if a part of the launcher's environment is missing, there are fewer devices than processes on this
            host, the processes do not divide as asked, or PyTorch is too old for FSDP2 on the CPU.
    """
    device = settings.torch_device.type
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            "Expected torchrun's environment for kd_distributed, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start it with "
            "`tune run --nproc_per_node N torchtune_kd/kd_distributed --config ...` "
            "or use torchtune_kd/kd_single_device."
        )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and local_size > torch.cuda.device_count():
        raise UserError(
            f"Expected one CUDA device per process, but --nproc_per_node is {local_size} and this host has "
            f"{torch.cuda.device_count()}: lower --nproc_per_node or set `device: cpu`."
        )
    replicate_dim, shard_dim = settings.data_parallel_replicate_dim, settings.data_parallel_shard_dim
    shape = mesh_shape(int(os.environ["WORLD_SIZE"]), replicate_dim, shard_dim)
    if device == "cpu" and torch.__version__ < "2.7":
        raise UserError(
            f"Expected PyTorch 2.7 or later for kd_distributed with `device: cpu`, where FSDP2 of {torch.__version__} "
            "fails: install a later one, set `device: cuda` or use torchtune_kd/kd_single_device."
        )
    here = _device(settings.device)
    if not dist.is_initialized():
        # with offloading gloo as well, for the tensors that FSDP keeps in host memory
        backend = training.get_distributed_backend(device, offload_ops_to_cpu=settings.fsdp_cpu_offload)
        dist.init_process_group(backend, timeout=SETUP_TIMEOUT)
    names = ("dp_replicate", "dp_shard")[-len(shape) :]
    host_group, step_group = (dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT) for _ in range(2))
    rank, size = dist.get_rank(), dist.get_world_size()
    # the torchrun agent that started a process; its host where there is no agent
    nodes: list[str] = [""] * size
    dist.all_gather_object(nodes, os.environ.get("GROUP_RANK", socket.gethostname()), group=host_group)
    on_this_node = [other for other in range(size) if nodes[other] == nodes[rank]]
    if rank == 0 and len(set(nodes)) > 1:
        print(describe_layout(nodes, shape[-1]), file=sys.stderr, flush=True)
    return World(
        device=here,
        rank=rank,
        size=size,
        sharded=True,
        mesh=init_device_mesh(here.type, shape, mesh_dim_names=names),
        node_group=dist.new_group(on_this_node, timeout=SETUP_TIMEOUT, use_local_synchronization=True),
        host_group=host_group,
        step_group=step_group,
    )


def describe_layout(nodes: Sequence[str], shards: int) -> str:
    """Say in one line where weights and gradients travel; ``nodes`` names each rank's node, ``shards`` share a copy."""
    size, num_nodes = len(nodes), len(set(nodes))
    copies = [nodes[first : first + shards] for first in range(0, size, shards)]
    line = f"{size} processes on {num_nodes} nodes, copies of the weights: {len(copies)}, each over {shards} processes"
    if all(len(set(copy)) == 1 for copy in copies):
        return f"{line} of one node: across nodes gradients travel, once per step."
    line += " of several nodes: across nodes the weights of every layer travel"
    if size % num_nodes == 0 and all(nodes[i] == nodes[i - i % (size // num_nodes)] for i in range(size)):
        line += f"; with data_parallel_replicate_dim={num_nodes} gradients alone would, once per step"
    return f"{line}."


def mesh_shape(size: int, replicate_dim: int, shard_dim: int) -> tuple[int, ...]:
    """Return ``(shards,)``, or ``(replicas, shards)`` for hybrid sharding.

    Args:
        size (int): number of processes.
        replicate_dim (int): number of copies of the weights; 1 shards them over all processes.
        shard_dim (int): number of processes that share one copy; -1: as many as there are for each.

    Raises:
        UserError: if ``size`` processes do not divide as asked.
    """
    shards = size // replicate_dim if shard_dim == -1 else shard_dim
    if replicate_dim * shards != size:
        raise UserError(
            f"Expected data_parallel_replicate_dim x data_parallel_shard_dim to be the number of processes, {size}, "
            f"got {replicate_dim} x {shard_dim}: for hybrid sharding set data_parallel_replicate_dim to the number of "
            "nodes and leave data_parallel_shard_dim at -1."
        )
    return (shards,) if replicate_dim == 1 else (replicate_dim, shards)


def leave_process_group() -> None:
    """Close the process group, if there is one, after dropping what still holds it.

    A sharded model that lives on until the interpreter ends would take gloo's threads with it, which aborts.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    kind = torch.device(name).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"Expected a CUDA device for `device: {name}`, but PyTorch {torch.__version__} sees none here: "
            "set `device: cpu` or install a CUDA build of PyTorch."
        )
    return utils.get_device(name)
