"""A teacher whose last hidden states were written to disk: no body, no forward, the head alone.

Shapes: B batch, S sequence, n valid tokens, D hidden width, V vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from torchtune_kd.caches.reader import CacheReader
from torchtune_kd.caches.states import decode
from torchtune_kd.config.reading import Config
from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.sharding import reshard
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import loading, phase
from torchtune_kd.kernels import Float8Weight, float8_weight
from torchtune_kd.losses import KDLoss
from torchtune_kd.losses.signals import Head, Hidden
from torchtune_kd.models.loading import load
from torchtune_kd.teachers.base import Unchanging
from torchtune_kd.teachers.cached_sparse import RENORMALISE, SparseTeacher
from torchtune_kd.teachers.read_ahead import ReadAhead, Reader


class CachedTeacher(Unchanging, nn.Module):
    """Give hidden states out of a cache, and the teacher's head.

    Under FSDP2 this module is the root: the head is gathered by the first signal of a step and stays so until
    :meth:`end_step`.

    Args:
        reader (Reader): of the states.
        head (Head): reads them. In 8-bit floats it is whole on every process; else its tensors become the parameters.
        rms (Tensor): [D] root mean squares of the channels, on ``device``.
        ignore_index (int): label of the tokens that do not count.
        device (torch.device): where signals go.
        dtype (torch.dtype): of the signals.
    """

    def __init__(
        self, reader: Reader, head: Head, rms: Tensor, *, ignore_index: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._ahead = ReadAhead(reader, ignore_index, device)
        self._rms, self._device, self._dtype = rms, device, dtype
        self._in_8_bits = head if isinstance(head.weight, Float8Weight) else None
        if self._in_8_bits is None:
            self.weight = nn.Parameter(head.weight, requires_grad=False)
            self.bias = None if head.bias is None else nn.Parameter(head.bias, requires_grad=False)

    def forward(self) -> Head:
        """Return the head, whole."""
        return self._in_8_bits or Head(self.weight, self.bias)

    def expect(self, batch: Batch) -> None:
        """Begin to read what a batch, still on the host, will ask for."""
        self._ahead.expect(batch)

    def signal(self, batch: Batch) -> Hidden:
        """Return the last hidden states [B, S, D], 0 where no label counts, and the head."""
        with phase("teacher"):
            places, columns = self._ahead.take(batch)
            states = torch.zeros(batch.labels.numel(), len(self._rms), dtype=self._dtype, device=self._device)
            if columns:
                states.index_copy_(0, places, decode(columns, self._dtype, self._rms))
            return Hidden((states.view(*batch.labels.shape, len(self._rms)),), (self(),))

    def end_step(self, student: nn.Module) -> None:
        """Give the gathered head back."""
        reshard(self)

    def close(self) -> None:
        """Let the threads read nothing more."""
        self._ahead.close()


def build_cached_teacher(
    config: Config, kd_loss: KDLoss, reader: CacheReader, world: World
) -> CachedTeacher | SparseTeacher:
    """Build the teacher of ``teacher_cache``: of hidden states with its head, frozen, in the run's dtype.

    Args:
        config (Config): the run's.
        kd_loss (KDLoss): the run's.
        reader (CacheReader): of the cache.
        world (World): the processes, over which the head is sharded.
    """
    settings = config.settings
    if reader.manifest.kind != "hidden":
        return SparseTeacher(
            reader,
            reader.manifest,
            kd_loss.temperature,
            ignore_index=kd_loss.ignore_index,
            device=world.device,
            renormalise=config.teacher_tail == RENORMALISE,
        )
    with loading("teacher", world.device):
        files = reader.head()
        rms = files.pop("channel_rms").to(world.device, copy=True)
        in_8_bits = config.teacher_head is not None
        sharded = world.sharded and not in_8_bits
        where = torch.device("meta") if sharded else world.device
        # copied even where nothing changes: a mapped file that is cut short would end the run
        whole = {name: tensor.to(where, settings.torch_dtype, copy=True) for name, tensor in files.items()}
        weight = float8_weight(whole["weight"]) if in_8_bits else whole["weight"]
        teacher = CachedTeacher(
            reader,
            Head(weight, whole.get("bias")),
            rms,
            ignore_index=kd_loss.ignore_index,
            device=world.device,
            dtype=settings.torch_dtype,
        )
        if sharded:
            fully_shard(teacher, mesh=world.mesh, reshard_after_forward=False)
            load(teacher, files, {}, settings, world)
    return teacher


def cache_of(config: Config, world: World) -> CacheReader | None:
    """Open the cache that a config names; None where it names none, or no teacher counts.

    Raises:
        UserError: for a folder that is no finished cache, or lacks a file.
    """
    if config.teacher_cache is None or not config.settings.uses_teacher:
        return None
    return CacheReader(Path(config.teacher_cache), pinned=world.device.type == "cuda")
