"""The teachers of a run, one or several: checked, identified, built and joined."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params

from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.caches.reader import CacheReader
from torchtune_kd.checkpoints.identity import teacher_identity
from torchtune_kd.config.checks import check_checkpoint_files, check_tokenizer_files
from torchtune_kd.config.reading import Config
from torchtune_kd.data.datasets import is_packed
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError
from torchtune_kd.losses import KDLoss
from torchtune_kd.models.build import check_vocabularies, on_meta
from torchtune_kd.models.float8_head import check_head
from torchtune_kd.models.quantised_body import quantise_body
from torchtune_kd.models.student import Student
from torchtune_kd.teachers.base import NoTeacher, Teacher
from torchtune_kd.teachers.cached import build_cached_teacher, cache_of
from torchtune_kd.teachers.cached_sparse import signal_of
from torchtune_kd.teachers.ensemble import Ensemble
from torchtune_kd.teachers.live import build_teacher
from torchtune_kd.teachers.own import AverageTeacher, BaseTeacher
from torchtune_kd.teachers.specialists import Specialists
from torchtune_kd.training.cached import check_cached_data, check_cached_models


class Source(NamedTuple):
    """Say where a teacher that is not the student comes from.

    Attributes:
        config (Config): the run's, as if this teacher were its only one.
        cache (CacheReader | None): what it said; None where it runs.
        datasets (tuple[int, ...]): positions of those whose rows it teaches; empty for all.
    """

    config: Config
    cache: CacheReader | None
    datasets: tuple[int, ...] = ()


def sources_of(config: Config, world: World) -> list[Source]:
    """Open the caches of a config's teachers, and return all that are not the student itself.

    Raises:
        UserError: for a folder that is no finished cache, or a cache without hidden states among several teachers.
    """
    taught = [entry.datasets for entry in config.teachers if entry.own is None] or [()]
    each_teacher = config.each_teacher()
    found = [Source(each, cache_of(each, world), rows) for each, rows in zip(each_teacher, taught, strict=False)]
    for each, cache, _ in found:
        if cache is not None:
            check_joint_cache(config, each, cache.manifest)
    return found


def check_joint_cache(config: Config, each: Config, manifest: CacheManifest) -> None:
    """Refuse a cache that cannot be one of several teachers.

    Args:
        config (Config): the run's.
        each (Config): the run's, as if this teacher were its only one.
        manifest (CacheManifest): of its cache.

    Raises:
        UserError: for one without hidden states.
    """
    if len(config.teachers) > 1 and manifest.kind != "hidden":
        raise UserError(
            f"Several teachers give hidden states, but the cache in {each.teacher_cache} holds "
            f"{manifest.stored}: write one of hidden states, or use this teacher alone."
        )


def with_signal(config: Config, caches: Sequence[tuple[Config, CacheManifest]]) -> Config:
    """Return the config with what its teacher gives, which decides on what is logged.

    Args:
        config (Config): the run's.
        caches (Sequence[tuple[Config, CacheManifest]]): those of its teachers, each with the config of that teacher
            alone.
    """
    if len(caches) != 1:
        return config
    (only,) = caches
    return replace(config, signal=signal_of(*only))


def check_teachers(
    config: Config, sources: Sequence[Source], student: TransformerDecoder, world: World
) -> tuple[int, int]:
    """Check all teachers without weights; return the ids that they and the student share, and the longest sequence.

    Args:
        config (Config): the run's.
        sources (Sequence[Source]): its teachers.
        student (TransformerDecoder): on the meta device.
        world (World): the processes.

    Raises:
        UserError: at the first that cannot teach.
    """
    vocab, longest = check_vocabularies(student, None), student.max_seq_len
    for each, cache, _ in sources:
        if cache is not None:
            check_cached_models(each, cache)
            vocab = min(vocab, check_vocabularies(student, cache.manifest.vocab))
            continue
        check_checkpoint_files(each.teacher_checkpointer)
        teacher = on_meta(each.teacher_model, config.settings, world)
        if each.teacher_weights is not None:
            quantise_body(teacher, each.teacher_weights, world.num_shards)
        if each.teacher_weights == "nf4" and world.sharded and world.num_shards == 1:
            raise UserError(
                "`teacher_weights: nf4` needs two processes or more that share the weights, but here each has a copy "
                "of its own: use kd_single_device, int8, or a smaller `data_parallel_replicate_dim`."
            )
        if each.teacher_head is not None:
            check_head(teacher)
        check_tokenizer_files((config.checkpointer, each.teacher_checkpointer))
        vocab, longest = min(vocab, check_vocabularies(student, teacher)), min(longest, teacher.max_seq_len)
    check_own(config, student)
    return vocab, longest


def check_own(config: Config, student: TransformerDecoder) -> None:
    """Refuse a student that cannot be its own teacher as the config says.

    Raises:
        UserError: for an average of offloaded weights, and for the base of a student without adapters.
    """
    for entry in config.teachers:
        if entry.own == "ema" and config.settings.fsdp_cpu_offload:
            raise UserError(
                f"`{entry.path}.self: ema` puts its averages where the weights are, which `fsdp_cpu_offload: True` "
                "copies to the GPU meanwhile: set that to False."
            )
        if entry.own == "base" and not get_adapter_params(student):
            raise UserError(
                f"`{entry.path}.self: base` teaches with the student's adapters off, but `model` is a full-weight one: "
                "name a builder with adapters, or `self: ema`."
            )


def check_data(sources: Sequence[Source], datasets: Sequence[tuple[str, Dataset]], world: World) -> None:
    """Refuse rows of the named datasets that are not in every cache.

    Raises:
        UserError: with the number of such rows.
    """
    for name, dataset in datasets if any(parts for _, _, parts in sources) and world.device.type == "cuda" else ():
        if is_packed(dataset):
            raise UserError(
                f"Teachers with `datasets` need rows that are not packed, but `{name}` is: set `{name}.packed: False`."
            )
    for _, cache, parts in sources:
        for name, dataset in datasets if cache is not None else ():
            check_cached_data(cache, dataset, name, world, parts)


def teachers_identity(config: Config, sources: Sequence[Source]) -> dict[str, Any]:
    """Return the teachers' part of a run's identity."""
    if not config.settings.uses_teacher:
        return {}
    single = not config.teachers
    found: dict[str, Any] = {} if single else {"ensemble": config.ensemble} if len(config.teachers) > 1 else {}
    names = iter([""] if single else [f" {entry.name!r}" for entry in config.teachers if entry.own is None])
    for (each, cache, _), name in zip(sources, names, strict=True):
        traits = dict(teacher_identity(each) if cache is None else cache.manifest.as_teacher)
        if each.teacher_head is not None:
            traits["teacher_head"] = each.teacher_head
        if each.teacher_tail is not None:
            traits["teacher_tail"] = each.teacher_tail
        found |= {f"{key}{name}": value for key, value in traits.items()}
    for entry in config.teachers:
        if len(config.teachers) > 1:  # sums depend on the order of what is summed
            found[f"{entry.path}.name"] = entry.name
        if entry.datasets:
            found[f"{entry.path}.datasets"] = list(entry.datasets)
        elif len(config.teachers) > 1:
            found[f"{entry.path}.share"] = entry.share
        if entry.own is not None:
            found[f"{entry.path}.self"] = entry.own
        if entry.own == "ema":
            found |= {f"{entry.path}.decay": entry.decay, f"{entry.path}.every_n_steps": entry.every_n_steps}
    return found


def build_sources(sources: Sequence[Source], kd_loss: KDLoss, world: World) -> list[Teacher]:
    """Build the teachers that are not the student, with their weights."""
    return [
        build_teacher(each, world) if cache is None else build_cached_teacher(each, kd_loss, cache, world)
        for each, cache, _ in sources
    ]


AverageBuilder = Callable[[Student, float, int], Teacher]


def joined(
    config: Config, built: Sequence[Teacher], student: Student, average: AverageBuilder = AverageTeacher
) -> Teacher:
    """Return the teacher of the run: the only one, or an ensemble.

    Args:
        config (Config): the run's.
        built (Sequence[Teacher]): those that are not the student.
        student (Student): the student, with the weights from which an average begins.
        average (AverageBuilder): builds the student's average, of the decay and the steps between two updates.
    """
    if not config.settings.uses_teacher:
        return NoTeacher()
    if not config.teachers:
        return built[0]
    members = list(_members(config, built, student, average))
    if config.teachers[0].datasets:
        return Specialists(members, [entry.datasets for entry in config.teachers], student.ignore_index)
    shares = [entry.share for entry in config.teachers]
    return members[0] if len(members) == 1 else Ensemble(members, shares, config.ensemble)


def _members(config: Config, built: Sequence[Teacher], student: Student, average: AverageBuilder) -> Iterator[Teacher]:
    others = iter(built)
    for entry in config.teachers:
        if entry.own == "base":
            yield BaseTeacher(student)
        elif entry.own == "ema":
            yield average(student, entry.decay, entry.every_n_steps)
        else:
            yield next(others)
