"""The keys of ``torchtune_kd/evaluate``, alone or beside those of a training run's config."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from torchtune_kd.config.reading import read_run_config
from torchtune_kd.config.sections import (
    Section,
    check_component,
    components_in,
    plain_values,
    section_of,
    sections_of,
)
from torchtune_kd.config.settings import Settings, interpolated_names, typed
from torchtune_kd.errors import UserError, nearest
from torchtune_kd.evaluation.candidates import Source, sources_of
from torchtune_kd.evaluation.latency import LatencySettings
from torchtune_kd.evaluation.tasks import check_task
from torchtune_kd.evaluation.tasks.names import HELDOUT

OWN = ("models", "reference", "tasks", "latency", "limit", "items", "results")  # beside those of a training run
ALONE = ("tokenizer", "dataset_val", "device", "dtype", "output_dir", "batch_size_val")  # where there is none
SECTIONS = ("model", "checkpointer")  # of each of `models`


@dataclass(frozen=True)
class Request:
    """Hold what is asked for.

    Attributes:
        sources (tuple[Source, ...]): the models, in the order of the config.
        reference (Source | None): whose distribution distances are measured against.
        tokenizer (Section): of all models.
        dataset_val (tuple[Section, ...]): the text of the task ``heldout``.
        settings (Settings): device, dtype, ``output_dir`` and ``batch_size_val``.
        tasks (tuple[str, ...]): names; ``heldout``, ``cities``, ``mmlu_dev``, files that end in .jsonl,
            ``lm_eval:...``.
        latency (LatencySettings | None): None times nothing.
        limit (int | None): items of each task, rows of the text; None takes all.
        items (bool): keep the value of every item, which comparisons need.
        results (Path): file that lines are added to.
        resolved (Mapping[str, Any]): the config as plain values.
    """

    sources: tuple[Source, ...]
    reference: Source | None
    tokenizer: Section
    dataset_val: tuple[Section, ...]
    settings: Settings
    tasks: tuple[str, ...]
    latency: LatencySettings | None
    limit: int | None
    items: bool
    results: Path
    resolved: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size_val or 8


def read_request(written: DictConfig) -> Request:
    """Check a config whole and return what it asks for.

    With a training run's config (it has ``kd_loss``) the models are those of the run: ``untrained``, ``student`` (its
    newest ``epoch_<n>``) and ``teacher``, or those of ``teachers`` that run, by their names; ``models`` then lists some
    of them, or holds others. Distances are measured against ``teacher`` where a model has that name.

    Raises:
        UserError: naming the first key that is unknown, missing, or has a value that cannot be.
    """
    rest = OmegaConf.masked_copy(written, [key for key in written if key not in OWN])
    if written.get("kd_loss") is not None:
        config = read_run_config(written, OWN)
        known, settings = sources_of(config), config.settings
        tokenizer, text = config.tokenizer, config.dataset_val
    else:
        known, settings = {}, _settings_alone(written, rest)
        tokenizer = section_of("tokenizer", written.get("tokenizer"))
        text = sections_of("dataset_val", written.get("dataset_val"))
        for section in components_in(rest):
            check_component(section)
    models = written.get("models")
    if isinstance(models, DictConfig) and models:
        sources = {str(name): _source(str(name), models[name]) for name in models}
    else:
        sources = _chosen(known, models)
    reference = _reference(written, {**known, **sources})
    tasks = _tasks(written, text)
    return Request(
        sources=tuple(sources.values()),
        reference=reference,
        tokenizer=tokenizer,
        dataset_val=text,
        settings=settings,
        tasks=tasks,
        latency=_latency(written.get("latency", {})),
        limit=_limit(written.get("limit")),
        items=typed("items", written.get("items", True), bool),
        results=Path(str(written.get("results") or Path(settings.output_dir) / "results.jsonl")),
        resolved=plain_values(written),
    )


def _settings_alone(written: DictConfig, rest: DictConfig) -> Settings:
    """Read the plain values of a config that is no training run's."""
    for key in rest:
        if key not in ALONE and key not in interpolated_names(written):
            raise UserError(f"Unknown key `{key}` in the config: {nearest(str(key), (*OWN, *ALONE))}")
    for key in ("models", "tokenizer", "output_dir"):
        if written.get(key) is None:
            raise UserError(
                f"Expected the key `{key}` in the config, but it is missing: add it, or give a config of "
                "torchtune_kd/kd_single_device, whose models are then evaluated."
            )
    types = {each.name: each.type for each in fields(Settings)}
    values = {key: typed(key, rest[key], types[key]) for key in ALONE[2:] if key in rest}
    settings = Settings(**{"device": "cpu", **values})
    if settings.dtype not in ("fp32", "bf16"):
        raise UserError(f"Expected `dtype` to be fp32 or bf16, got {settings.dtype}: change it.")
    return settings


def _source(name: str, section: Any) -> Source:
    path = f"models.{name}"
    if not isinstance(section, DictConfig) or set(section) != set(SECTIONS):
        raise UserError(f"Expected `{path}` to hold {' and '.join(f'`{key}`' for key in SECTIONS)} alone: correct it.")
    parts = [section_of(f"{path}.{key}", section[key]) for key in SECTIONS]
    for part in parts:
        check_component(part)
    return Source(name, *parts)


def _chosen(known: Mapping[str, Source], names: Any) -> dict[str, Source]:
    if names is None:
        if not known:
            raise UserError("Expected models with files to evaluate, but the config has `random_weights`: name files.")
        return dict(known)
    if not isinstance(names, ListConfig) or not names:
        raise UserError(
            f"Expected `models` to be a list of names, or a section for each model, got {names!r}: change it."
        )
    for name in names:
        if name not in known:
            there = f"did you mean one of {', '.join(known)}?"
            if name == "student":
                there = "`output_dir` holds no `epoch_<n>` with merged weights yet, which training writes."
            raise UserError(f"Unknown model `{name}` under `models`: {there}")
    return {str(name): known[name] for name in names}


def _reference(written: DictConfig, known: Mapping[str, Source]) -> Source | None:
    name = written.get("reference", "teacher" if "teacher" in known else None)
    if name is not None and name not in known:
        raise UserError(f"Expected `reference` to be one of {', '.join(known)} or null, got {name}: change it.")
    return None if name is None else known[name]


def _tasks(written: DictConfig, text: tuple[Section, ...]) -> tuple[str, ...]:
    tasks = written.get("tasks", [HELDOUT] if text else [])
    if not isinstance(tasks, ListConfig | list):
        raise UserError(f"Expected `tasks` to be a list such as [heldout,cities], got {tasks!r}: change it.")
    for name in map(str, tasks):
        check_task(name)
    if HELDOUT in tasks and not text:
        raise UserError("The task `heldout` measures on the text of `dataset_val`, which is missing: add that section.")
    return tuple(map(str, tasks))


def _latency(section: Any) -> LatencySettings | None:
    if section is None:
        return None
    types = {each.name: each.type for each in fields(LatencySettings)}
    values = plain_values(section) if isinstance(section, DictConfig) else dict(section)
    for key, value in values.items():
        if key not in types:
            raise UserError(f"Unknown key `latency.{key}`: {nearest(key, types)}")
        numbers = value if key == "batch_sizes" and isinstance(value, list) else [value]
        if not numbers or any(
            isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers
        ):
            raise UserError(f"Expected `latency.{key}` to be whole numbers of at least 1, got {value!r}: change it.")
        values[key] = tuple(numbers) if key == "batch_sizes" else value
    return LatencySettings(**values)


def _limit(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"Expected `limit` to be at least 1 or null, got {value!r}: change it.")
    return value
