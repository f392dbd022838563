"""Plan each teacher by itself."""

from collections.abc import Iterable
from dataclasses import dataclass

from torchtune_kd.plan.meta_models import MetaTeacher, Models


@dataclass(frozen=True)
class TeacherPlan:
    """Hold what one teacher takes beside the student.

    Attributes:
        name (str): as under ``teachers``; "teacher" of ``teacher_model`` or ``teacher_cache``.
        kind (str): "live", "cache", or, of the student itself, "base" or "ema".
        share (float | None): its weight in an ensemble; None of a teacher with ``datasets``.
        datasets (tuple[int, ...]): positions of those whose rows it teaches; empty for all.
        parameters (int): its weights, of a cached one those of the head, of an average the trained ones.
        bytes (int): of them, and of rotary tables, on a device.
        cache_bytes_per_token (int | None): that its states take in a cache; None where it runs.
        float8_head (bool): whether its head is in 8-bit floats.
    """

    name: str
    kind: str
    share: float | None
    datasets: tuple[int, ...]
    parameters: int
    bytes: int
    cache_bytes_per_token: int | None
    float8_head: bool


def each_teacher(models: Models, parameters: Iterable[int], sizes: Iterable[int]) -> tuple[TeacherPlan, ...]:
    """Return what is planned of each teacher.

    Args:
        models (Models): as they run, see :func:`.as_run`.
        parameters (Iterable[int]): of each teacher.
        sizes (Iterable[int]): bytes of each on a device.
    """
    return tuple(
        TeacherPlan(
            name=teacher.name,
            kind=teacher.own or ("live" if teacher.manifest is None else "cache"),
            share=_share(teacher),
            datasets=() if teacher.entry is None else teacher.entry.datasets,
            parameters=count,
            bytes=size,
            cache_bytes_per_token=None if teacher.manifest is None else teacher.manifest.bytes_per_token,
            float8_head=teacher.head is not None,
        )
        for teacher, count, size in zip(models.teachers, parameters, sizes, strict=True)
    )


def _share(teacher: MetaTeacher) -> float | None:
    if teacher.entry is None:
        return 1.0
    return None if teacher.entry.datasets else teacher.entry.share
