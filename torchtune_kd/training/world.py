"""The processes that take part in a run, and what they add up."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune import training, utils

from torchtune_kd.training.errors import UserError


@dataclass(frozen=True)
class World:
    """One process among ``size``. ``sharded`` says whether models are sharded over the processes with FSDP2."""

    device: torch.device
    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The elementwise sum of ``tensor``, which is on ``self.device``, over all processes."""
        tensor = tensor.clone()
        if self.sharded:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.sharded:
            dist.barrier()

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Let rank 0 go through the block alone, then the others: for downloads and caches that it fills."""
        if not self.is_rank_zero:
            self.barrier()
        yield
        if self.is_rank_zero:
            self.barrier()


def single_process(device: str) -> World:
    """The world of a single-device recipe."""
    return World(device=_device(device))


def join_process_group(device: str, *, cpu_offload: bool = False) -> World:
    """Join the process group that the launcher prepared: NCCL on CUDA, gloo on the CPU.

    Args:
        device (str): ``cuda`` or ``cpu``.
        cpu_offload (bool): also open a gloo group for the tensors that FSDP keeps in host memory.

    Raises:
        UserError: if the process was not started by ``torchrun`` / ``tune run --nproc_per_node``, or there are
            fewer devices than processes on this host.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            "Expected torchrun's environment for kd_distributed, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start it with "
            "`tune run --nproc_per_node N torchtune_kd/kd_distributed --config ...` "
            "or use torchtune_kd/kd_single_device."
        )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.device(device).type == "cuda" and local_size > torch.cuda.device_count():
        raise UserError(
            f"Expected one CUDA device per process, but --nproc_per_node is {local_size} and this host has "
            f"{torch.cuda.device_count()}: lower --nproc_per_node or set `device: cpu`."
        )
    here = _device(device)
    if not dist.is_initialized():
        dist.init_process_group(training.get_distributed_backend(here.type, offload_ops_to_cpu=cpu_offload))
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(device=here, rank=rank, size=size, sharded=True)


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
