"""FSDP2 on teacher and student: which modules are gathered together, in which order, over which processes.

With hybrid sharding the mesh has two dimensions: weights are gathered over ``dp_shard`` alone, and over
``dp_replicate`` (across nodes) only gradients travel, of a teacher nothing.
"""

import functools
import itertools
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import training

from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import World


def shard(root: nn.Module, settings: Settings, world: World, extra_layers: list[str] | None = None) -> None:
    """FSDP2 on every transformer layer of ``root.decoder``, on ``extra_layers`` by name, and on ``root`` for the rest.

    The rest (embedding, last norm, head) is gathered once per step, whether it trains or is frozen.
    """
    options: dict[str, Any] = {"mesh": world.mesh, "reshard_after_forward": settings.fsdp_reshard_after_forward}
    if settings.fsdp_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    condition = functools.partial(training.get_shard_conditions, names_to_match=extra_layers)
    for name, module in reversed(list(root.decoder.named_modules())):
        if condition(name, module):
            fully_shard(module, **options)
    options["reshard_after_forward"] = False
    fully_shard(root, **options)
    _prefetch_in_order(root)


def reshard(root: nn.Module) -> None:
    """Give back every gathered parameter below ``root``, where it is sharded at all."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_tensor(whole: Tensor, target: Tensor) -> Tensor:
    """Cut this process's part out of ``whole``, laid out (and quantised) like ``target``, without communication.

    Args:
        whole (Tensor): on the device, alike on every process.
        target (Tensor): a parameter of a sharded model, on the meta device; a plain one takes ``whole`` itself.
    """
    if isinstance(target, NF4Tensor):
        return to_nf4(whole, block_size=target.block_size, scaler_block_size=target.scaler_block_size)
    if not isinstance(target, DTensor):
        return whole
    like = target._local_tensor
    if isinstance(like, NF4Tensor):
        # the whole first, so that the scales do not depend on the number of processes
        whole = to_nf4(whole, block_size=like.block_size, scaler_block_size=like.scaler_block_size)
    mesh = target.device_mesh
    shards, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    parts = torch.chunk(whole, shards, dim=0)
    part = parts[index] if index < len(parts) else whole[:0]
    local = part.new_zeros(part.size())
    local.copy_(part)
    meta = TensorMeta(shape=target.size(), stride=target.stride(), dtype=target.dtype)
    spec = DTensorSpec(mesh=mesh, placements=target.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=target.requires_grad)  # from_local would want views of NF4


def gather_tensor(sharded: Tensor, device: torch.device) -> Tensor:
    """Gather a parameter, dequantised, on ``device``; every process takes part."""
    if sharded.device != device:  # offloaded
        sharded = sharded.to(device)
    if not isinstance(sharded, DTensor):
        return sharded.to(sharded.dtype) if isinstance(sharded, NF4Tensor) else sharded
    if isinstance(sharded._local_tensor, NF4Tensor):
        return _gather_nf4(sharded._local_tensor, sharded.device_mesh["dp_shard"])
    return sharded.full_tensor()


def _gather_nf4(local: NF4Tensor, mesh: DeviceMesh) -> Tensor:
    """torchtune's own takes a mesh of one dimension for the whole world."""
    group = mesh.get_group()
    parts, metadata = local.fsdp_pre_all_gather(mesh)
    wholes = [part.new_empty(part.shape[0] * group.size(), *part.shape[1:]) for part in parts]
    for whole, part in zip(wholes, parts, strict=True):
        dist.all_gather_into_tensor(whole, part, group)
    quantised, _ = local.fsdp_post_all_gather(tuple(wholes), metadata, local.dtype)
    return quantised.to(quantised.dtype)


def _prefetch_in_order(root: nn.Module) -> None:
    """Ask for the next group's weights before this one's are used: forward in order, backward in reverse.

    Two layers are gathered at a time then, and every process asks for the same ones in the same order.
    """
    groups = [cast(FSDPModule, module) for module in root.modules() if isinstance(module, FSDPModule)]
    for group, following in itertools.pairwise(groups):  # the root comes first, its layers in the order of the forward
        group.set_modules_to_forward_prefetch([following])
    for group, following in itertools.pairwise([groups[0], *reversed(groups[1:])]):
        group.set_modules_to_backward_prefetch([following])
