"""The keys under ``cache``, beside the config of a training run."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from torchtune_kd.caches import log_probs, states
from torchtune_kd.caches.layout import DTYPES, KINDS, POSITIONS
from torchtune_kd.config.reading import Config, read_run_config
from torchtune_kd.config.settings import typed
from torchtune_kd.errors import UserError, nearest

OF_A_CACHED_RUN = ("teacher_cache", "teacher_tail")  # keys of the run that will read what is written
_OF_KIND = {"dtype": "hidden", "k": "top_k", "temperatures": "top_k", "samples": "sampled"}
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class CacheKeys:
    """Say what is written where; see docs/teachers.md."""

    folder: str  # where the config has none, its `teacher_cache`
    kind: str = "hidden"
    dtype: str = "bf16"  # of hidden states
    k: int = 64  # of top_k: likeliest ids
    temperatures: list[float] | None = None  # of top_k: where the mass of the rest is stored; the run's and 1
    samples: int = 50  # of sampled: draws
    positions: str = "labels"  # tokens that are stored: those with a label, or all
    shard_size: int | str = "512MiB"
    tokens_per_batch: int = 16384  # of a forward, on each process
    verify: bool = False  # read every file again in the end


@dataclass(frozen=True)
class Request:
    """Hold what is asked for.

    Attributes:
        config (Config): of the training run whose teacher and data are meant.
        keys (CacheKeys): those under ``cache``.
        shard_bytes (int): after which a shard is closed.
        temperatures (tuple[float, ...]): at which the mass of what is not stored is.
    """

    config: Config
    keys: CacheKeys
    shard_bytes: int
    temperatures: tuple[float, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.keys.folder)

    def bytes_per_token(self, width: int) -> int:
        """Return the most that a token of a teacher of this hidden width takes."""
        keys = self.keys
        if keys.kind == "hidden":
            return states.bytes_per_token(keys.dtype, width)
        return log_probs.bytes_per_token(keys.kind, keys.k, self.temperatures, keys.samples)


def read_request(written: DictConfig, *, distributed: bool = False) -> Request:
    """Check a config whole and return what it asks for.

    Raises:
        UserError: naming the first key that is unknown, missing, or has a value that cannot be.
    """
    config = read_run_config(written, ("cache", *OF_A_CACHED_RUN), distributed=distributed)
    if config.teachers:
        raise UserError(
            "A cache is of one teacher, but the config has `teachers`: name one under `teacher_model` and "
            "`teacher_checkpointer`."
        )
    if not config.settings.uses_teacher:
        raise UserError("`kd_ratio: 0` runs no teacher, so there is nothing to write: set it above 0.")
    section = written.get("cache")
    if section is None:
        section = OmegaConf.create({})
    if not isinstance(section, DictConfig):
        raise UserError(f"Expected a section `cache` with a `folder`, got {section!r}: write cache.folder=FOLDER.")
    known = {field.name: field for field in fields(CacheKeys)}
    values: dict[str, Any] = {}
    for key in section:
        if key not in known:
            raise UserError(f"Unknown key `cache.{key}`: {nearest(str(key), known)}")
        kind = section.get("kind", "hidden")
        if kind in KINDS and _OF_KIND.get(str(key), kind) != kind:
            raise UserError(
                f"`cache.{key}` belongs to `cache.kind: {_OF_KIND[str(key)]}`: delete it, or write that kind."
            )
        if key != "temperatures":
            values[str(key)] = typed(f"cache.{key}", section[key], known[str(key)].type)
    values["folder"] = _folder(values.get("folder"), written.get("teacher_cache"))
    keys = CacheKeys(**values)
    for name, choices in (("kind", KINDS), ("dtype", DTYPES), ("positions", POSITIONS)):
        if getattr(keys, name) not in choices:
            raise UserError(
                f"Expected `cache.{name}` to be {' or '.join(choices)}, got {getattr(keys, name)!r}: change it."
            )
    if keys.tokens_per_batch < 1:
        raise UserError(f"Expected `cache.tokens_per_batch` to be at least 1, got {keys.tokens_per_batch}: change it.")
    if keys.k < 1:
        raise UserError(f"Expected `cache.k` to be at least 1, got {keys.k}: change it.")
    if not 1 <= keys.samples <= 255:
        raise UserError(f"Expected `cache.samples` to be from 1 to 255, got {keys.samples}: change it.")
    temperatures = _temperatures(section.get("temperatures"), config) if keys.kind == "top_k" else ()
    return Request(config, keys, _size(keys.shard_size), temperatures)


def _folder(folder: str | None, read_by_the_run: Any) -> str:
    """Return where to write: `cache.folder`, or where the run of the same config will read."""
    if folder is None and read_by_the_run is None:
        raise UserError("Expected `cache.folder` in the config, but it is missing: add cache.folder=FOLDER.")
    if folder is None:
        return typed("teacher_cache", read_by_the_run, str)
    if read_by_the_run is not None and Path(folder) != Path(str(read_by_the_run)):
        raise UserError(
            f"Expected `cache.folder` to be what the config's run reads, `teacher_cache: {read_by_the_run}`, got "
            f"{folder}: leave it out, or change `teacher_cache` too."
        )
    return folder


def _temperatures(given: Any, config: Config) -> tuple[float, ...]:
    """Return the temperatures of the tails: those given, or 1 and the run's."""
    if given is None:
        return tuple(sorted({1.0, float(config.kd_loss.build().temperature)}))
    values = OmegaConf.to_container(given) if isinstance(given, ListConfig) else [given]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values) or not all(0.001 <= number <= 1000 for number in numbers):
        raise UserError(
            f"Expected `cache.temperatures` to be a list of numbers from 0.001 to 1000, got {given!r}: change it."
        )
    return tuple(sorted({float(number) for number in numbers}))


def _size(text: int | str) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit and match[1].count(".") < 2 else 0
    if size < 1:
        raise UserError(
            f"Expected `cache.shard_size` to be bytes, such as 536870912 or 512MiB, got {text!r}: change it."
        )
    return size
