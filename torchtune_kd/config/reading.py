"""A run's config, read once: after it nobody touches the YAML."""

import difflib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.config.checks import (
    check_kd_loss,
    check_needed_sections,
    check_random_weights,
    check_teacher_cache,
    check_teacher_head,
)
from torchtune_kd.config.sections import (
    Section,
    check_component,
    components_in,
    plain_values,
    section_of,
    sections_of,
)
from torchtune_kd.config.settings import DISTRIBUTED_ONLY, KEYS, Settings, read_settings
from torchtune_kd.config.teachers import MIXES, TeacherEntry, read_teachers
from torchtune_kd.errors import UserError


@dataclass(frozen=True)
class Config:
    """Plain values of the loop, components, and what is logged.

    Attributes:
        settings (Settings): the plain values.
        model (Section): the student.
        tokenizer (Section): of both models.
        dataset (tuple[Section, ...]): training data; several are concatenated.
        optimizer (Section): over the trainable parameters.
        kd_loss (Section): one of ``torchtune_kd.losses``.
        metric_logger (Section): one of torchtune's.
        checkpointer (Section | None): the student's files; None with ``random_weights: True``.
        teacher_model (Section | None): may be None at ``kd_ratio: 0`` or with a ``teacher_cache``, like the next.
        teacher_checkpointer (Section | None): None with ``random_weights: True`` as well.
        teacher_head (str | None): one of :data:`~torchtune_kd.config.settings.TEACHER_HEADS`; None as it is.
        teacher_weights (str | None): one of :data:`~torchtune_kd.config.settings.TEACHER_WEIGHTS`; None as ``dtype``.
        teacher_cache (str | None): folder of what the teacher said, in place of a teacher that runs.
        teacher_tail (str | None): "renormalise" takes a cache's likeliest ids for the whole teacher.
        dataset_val (tuple[Section, ...]): validation data; empty where there is none.
        lr_scheduler (Section | None): None for a constant rate.
        profiler (Section | None): torchtune's.
        teachers (tuple[TeacherEntry, ...]): several teachers, or the student's own past, in place of all these.
        ensemble (str): how several are mixed, "probabilities" or "logits".
        written (DictConfig): what was read, for the log.
        signal (str): what the teacher gives: "hidden", or, from a cache, "top_k", "top_k_alone" (without the mass of
            the rest at T = 1) or "sampled"; with "_without_entropy" behind it where that of the teacher is not known.
    """

    settings: Settings
    model: Section
    tokenizer: Section
    dataset: tuple[Section, ...]
    optimizer: Section
    kd_loss: Section
    metric_logger: Section
    checkpointer: Section | None
    teacher_model: Section | None
    teacher_checkpointer: Section | None
    teacher_head: str | None
    teacher_weights: str | None
    teacher_cache: str | None
    teacher_tail: str | None
    dataset_val: tuple[Section, ...]
    lr_scheduler: Section | None
    profiler: Section | None
    written: DictConfig
    teachers: tuple[TeacherEntry, ...] = ()
    ensemble: str = MIXES[0]
    signal: str = "hidden"

    @property
    def resolved(self) -> dict[str, Any]:
        """Return everything as plain values, interpolations filled in."""
        return plain_values(self.written)

    @property
    def runs_teacher(self) -> bool:
        """Return whether the one teacher is a model of its own that runs beside the student."""
        return self.settings.uses_teacher and self.teacher_cache is None and not self.teachers

    def each_teacher(self) -> tuple["Config", ...]:
        """Return a config for each teacher that is no part of the student, as if it were the only one."""
        if not self.settings.uses_teacher:
            return ()
        if not self.teachers:
            return (self,)
        return tuple(self.with_teacher(entry) for entry in self.teachers if entry.own is None)

    def with_teacher(self, entry: TeacherEntry) -> "Config":
        """Return the config with this one of its ``teachers``, which is no part of the student, as the only one."""
        return replace(
            self,
            teachers=(),
            teacher_model=entry.model,
            teacher_checkpointer=entry.checkpointer,
            teacher_cache=entry.cache,
            teacher_tail=entry.tail,
            teacher_head=entry.head,
            teacher_weights=entry.weights,
        )

    def with_keys(self, keys: Mapping[str, Any]) -> "Config":
        """Return the config with other values under dotted keys; ``None`` takes a key of a section out."""
        written = OmegaConf.create(self.resolved)
        for key, value in keys.items():
            if value is None:
                section, _, name = key.rpartition(".")
                OmegaConf.select(written, section).pop(name, None)
            else:
                OmegaConf.update(written, key, value, force_add=True)
        plain = {key: value for key, value in keys.items() if hasattr(self.settings, key)}
        return replace(_assembled(written, replace(self.settings, **plain)), signal=self.signal)


def read_config(written: DictConfig, *, distributed: bool | None = None) -> Config:
    """Check a config whole and return what it holds. Nothing is built or loaded yet.

    Args:
        written (DictConfig): as the command line and the YAML file gave it.
        distributed (bool | None): whether several processes may take part, to which some keys belong; None asks the
            environment for a launcher.

    Raises:
        UserError: naming the first key that is unknown, missing, or has a value that cannot be.
    """
    settings = read_settings(written, distributed=started_by_launcher() if distributed is None else distributed)
    teachers = read_teachers(written, random_weights=settings.random_weights)
    runs_teacher = settings.uses_teacher and written.get("teacher_cache") is None and not teachers
    check_random_weights(written, asked=settings.random_weights, runs_teacher=runs_teacher)
    check_needed_sections(written, runs_teacher=runs_teacher, random_weights=settings.random_weights)
    check_teacher_head(written)
    check_teacher_cache(written)
    config = _assembled(written, settings)
    check_kd_loss(config.kd_loss)
    for section in components_in(written):
        check_component(section)
    return config


def read_run_config(written: DictConfig, own: Collection[str], *, distributed: bool = False) -> Config:
    """Check what another recipe is given beside its own keys: the config of a training run.

    Args:
        written (DictConfig): as the command line and the YAML file gave it.
        own (Collection[str]): keys of that recipe.
        distributed (bool): whether several processes are meant even where no key of theirs is there.

    Raises:
        UserError: for a config of another recipe, and as :func:`read_config`.
    """
    run = OmegaConf.masked_copy(written, [str(key) for key in written if key not in own])
    if run.get("kd_loss") is None:
        raise UserError(
            "Expected a config of torchtune_kd/kd_single_device or torchtune_kd/kd_distributed, but this one has no "
            "`kd_loss`: it is another recipe's, see `tune ls` for ours."
        )
    for key in run:
        meant = difflib.get_close_matches(str(key), own, n=1, cutoff=0.8)
        if meant and key not in KEYS:
            raise UserError(f"Unknown key `{key}` in the config: did you mean `{meant[0]}`?")
    return read_config(run, distributed=distributed or any(key in run for key in DISTRIBUTED_ONLY))


def started_by_launcher() -> bool:
    """Return whether torchrun, or another launcher that speaks its variables, started one of several processes.

    Some clusters set the variables in every container, so the name of the single-device recipe counts more.
    """
    return "torchtune_kd/kd_single_device" not in sys.orig_argv and {"RANK", "WORLD_SIZE"} <= set(os.environ)


def _assembled(written: DictConfig, settings: Settings) -> Config:
    def needed(name: str) -> Section:
        return section_of(name, written.get(name))

    def optional(name: str) -> Section | None:
        return None if written.get(name) is None else needed(name)

    return Config(
        settings=settings,
        model=needed("model"),
        tokenizer=needed("tokenizer"),
        dataset=sections_of("dataset", written.dataset),
        optimizer=needed("optimizer"),
        kd_loss=needed("kd_loss"),
        metric_logger=needed("metric_logger"),
        checkpointer=optional("checkpointer"),
        teacher_model=optional("teacher_model"),
        teacher_checkpointer=optional("teacher_checkpointer"),
        teacher_head=written.get("teacher_head"),
        teacher_weights=written.get("teacher_weights"),
        teacher_cache=written.get("teacher_cache"),
        teacher_tail=written.get("teacher_tail"),
        dataset_val=sections_of("dataset_val", written.get("dataset_val")),
        lr_scheduler=optional("lr_scheduler"),
        profiler=optional("profiler"),
        written=written,
        teachers=read_teachers(written, random_weights=settings.random_weights),
        ensemble=written.get("ensemble") or MIXES[0],
    )
