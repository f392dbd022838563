"""The teachers of a dry step: the recipe's own, over weights and caches without values.

Which rows of a microbatch a teacher with ``datasets`` speaks of depends on the data. FLOPs and times are those of
rows in equal shares, memory is that of the worst case: one teacher has all rows. A teacher without a row runs on one
that does not count, as it does in a run.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.caches.reader import Reading
from torchtune_kd.caches.states import encode
from torchtune_kd.config.reading import Config
from torchtune_kd.data.documents import Document
from torchtune_kd.losses import KDLoss
from torchtune_kd.losses.signals import Head
from torchtune_kd.models.student import Student
from torchtune_kd.plan.meta_models import MetaTeacher, Models, StoredTeacher
from torchtune_kd.teachers.base import Teacher
from torchtune_kd.teachers.cached import CachedTeacher
from torchtune_kd.teachers.cached_sparse import SparseTeacher
from torchtune_kd.teachers.live import LiveTeacher
from torchtune_kd.teachers.own import AverageTeacher
from torchtune_kd.training.teachers import joined


class Deals(NamedTuple):
    """Say which dataset each row of a microbatch is from, for several microbatches.

    Attributes:
        equal (list[list[int]]): microbatches in which, taken together, each teacher has equally many rows.
        uneven (list[list[int]]): others, of which memory is looked at as well.
    """

    equal: list[list[int]]
    uneven: list[list[int]]


def deals(config: Config, batch_size: int) -> Deals:
    """Return the microbatches to look at: one, unless teachers have ``datasets``."""
    datasets = [entry.datasets[0] for entry in config.teachers if entry.datasets and config.settings.uses_teacher]
    if not datasets:
        return Deals([[]], [])
    turns = range(len(datasets) if batch_size % len(datasets) else 1)
    equal = [[datasets[(row + turn) % len(datasets)] for row in range(batch_size)] for turn in turns]
    alone = [[dataset] * batch_size for dataset in datasets]
    return Deals(equal, [parts for parts in alone if parts not in equal])


def dry_teacher(config: Config, models: Models, kd_loss: KDLoss, student: Student, shards: int) -> Teacher:
    """Build the teacher of a run, one or several, as the recipe joins them.

    Args:
        config (Config): the run's.
        models (Models): of the same config.
        kd_loss (KDLoss): the run's.
        student (Student): over the student of ``models``.
        shards (int): P processes that share the weights: each moves its part of an average.
    """

    def local(tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1)[: -(-tensor.numel() // shards)]

    built = [_alone(teacher, kd_loss) for teacher in models.others]
    return joined(config, built, student, functools.partial(AverageTeacher, local=local))


def _alone(teacher: MetaTeacher, kd_loss: KDLoss) -> Teacher:
    stored = teacher.model
    if not isinstance(stored, StoredTeacher):
        return LiveTeacher(stored, teacher.head)
    where = {"ignore_index": kd_loss.ignore_index, "device": torch.device("meta")}
    reader, manifest = _DryReader(stored.manifest), stored.manifest
    if manifest.kind != "hidden":
        renormalise = teacher.config.teacher_tail is not None
        return SparseTeacher(reader, manifest, kd_loss.temperature, renormalise=renormalise, **where)
    head = teacher.head or Head(stored.weight, stored.bias)
    rms = torch.empty(manifest.width, device="meta")
    return CachedTeacher(reader, head, rms, dtype=stored.computed_in, **where)


class _DryReader:
    """Stands for the files of a cache."""

    def __init__(self, manifest: CacheManifest) -> None:
        self._manifest = manifest

    def read(self, documents: Sequence[Document]) -> Reading:
        """Return columns of the right size, without values."""
        manifest, tokens = self._manifest, sum(len(document.positions) for document in documents)
        if manifest.kind == "hidden":
            rms = torch.empty(manifest.width, device="meta")
            return Reading(encode(rms.new_empty(tokens, manifest.width), str(manifest.dtype), rms), [])
        sizes = {
            name: ((tokens,) if width is None else (tokens, width), dtype)
            for name, (dtype, width) in manifest.columns.items()
        }
        return Reading(
            {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}, []
        )

    def close(self) -> None:
        """Read nothing, as before."""
