"""The keys of ``torchtune_kd/sweep``."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from torchtune_kd._torchtune import recipe_registry
from torchtune_kd.config.sections import plain_values
from torchtune_kd.config.settings import typed
from torchtune_kd.errors import UserError, nearest
from torchtune_kd.reports.results import METRICS
from torchtune_kd.sweeps.grid import Cell, cells_of

RECIPES = ("torchtune_kd/kd_single_device", "torchtune_kd/kd_distributed")
MODELS = ("untrained", "teacher")  # that a sweep can measure beside what it trains
KEEP = ("none", "all")


@dataclass(frozen=True)
class Keys:
    """The plain keys, with their defaults.

    Attributes:
        output_dir (str): the sweep's folder; several processes may share it.
        run_config (str): the runs' config, a name of ``tune ls`` or a path.
        run_recipe (str): the runs' recipe.
        overrides (dict): values for all runs, by dotted key.
        grid (dict): for each dotted key its values, or labels with values.
        cells (dict): overrides of single cells beside the grid, by name.
        exclude (list): combinations of the grid to leave out.
        models (list): ``untrained`` and ``teacher``, measured once.
        seeds (list): of the runs.
        tune (dict): for each dotted key the values of which every cell takes its best.
        tune_by (str): the validation metric, without ``val_``, whose last value chooses; lower is better.
        evaluate (dict): keys of ``torchtune_kd/evaluate`` for every trained model; none evaluates nothing.
        slots (int | str): runs at once, or ``cuda:auto`` for as many as the GPUs hold.
        devices_per_run (int): processes of a run; more than 1 need ``kd_distributed``.
        keep (str): weights of the runs: none or all.
        retry_failed (bool): start runs again that failed before.
        dry_run (bool): only say what would be done.
    """

    output_dir: str
    run_config: str
    run_recipe: str = RECIPES[0]
    overrides: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    cells: dict = field(default_factory=dict)
    exclude: list = field(default_factory=list)
    models: list = field(default_factory=list)
    seeds: list = field(default_factory=lambda: [0])
    tune: dict = field(default_factory=dict)
    tune_by: str = "class_loss"
    evaluate: dict = field(default_factory=dict)
    slots: int | str = 1
    devices_per_run: int = 1
    keep: str = "none"
    retry_failed: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Request:
    """Hold what is asked for: the keys, checked, the cells, and the runs' base config."""

    keys: Keys
    cells: tuple[Cell, ...]
    base: DictConfig

    @property
    def folder(self) -> Path:
        return Path(self.keys.output_dir)

    @property
    def distributed(self) -> bool:
        return self.keys.run_recipe.endswith("kd_distributed")

    @property
    def slots(self) -> list[str | None]:
        """Return what CUDA_VISIBLE_DEVICES is for each run at once; None leaves it."""
        if self.keys.slots != "cuda:auto":
            return [None] * int(self.keys.slots)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        each = self.keys.devices_per_run
        groups = [devices[start : start + each] for start in range(0, len(devices) - each + 1, each)]
        if not groups:
            raise UserError(
                f"`slots: cuda:auto` gives every run {each} GPU{'s' * (each > 1)}, but {len(devices)} are visible: "
                "lower `devices_per_run`, or set `slots: 1`."
            )
        return [",".join(group) for group in groups]


def read_request(written: DictConfig) -> Request:
    """Check a sweep's config, and find the config of its runs.

    Raises:
        UserError: naming the first key that is unknown, missing, or has a value that cannot be.
    """
    types = {each.name: each for each in dataclasses.fields(Keys)}
    for key in written:
        if key not in types:
            raise UserError(f"Unknown key `{key}` in the sweep's config: {nearest(str(key), types)}")
    plain = plain_values(written)
    values = {}
    for name, each in types.items():
        if plain.get(name) is not None:
            values[name] = _typed(name, plain[name], each.type)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UserError(f"Expected the key `{name}` in the sweep's config, but it is missing: add it.")
    keys = Keys(**values)
    _check(keys)
    cells = cells_of(keys.grid, _single(keys.cells), keys.exclude)
    taken = {cell.name for cell in cells} & set(keys.models)
    if taken:
        raise UserError(f"Expected one cell of each name, but {sorted(taken)[0]!r} is also one of `models`: rename it.")
    return Request(keys, tuple(cells), _base(keys.run_config))


def _typed(name: str, value: Any, type_: Any) -> Any:
    if type_ in (dict, list):
        if not isinstance(value, type_):
            kind = "a mapping" if type_ is dict else "a list"
            raise UserError(f"Expected `{name}` to be {kind}, got {value!r}: change it.")
        return value
    return typed(name, value, type_)


def _check(keys: Keys) -> None:
    def expect(name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"Expected `{name}` to be {expected}, got {getattr(keys, name)}: change it.")

    expect("run_recipe", keys.run_recipe in RECIPES, f"one of {', '.join(RECIPES)}")
    good = keys.slots == "cuda:auto" or (isinstance(keys.slots, int) and keys.slots >= 1)
    expect("slots", good, "1 or more, or cuda:auto")
    expect("devices_per_run", keys.devices_per_run >= 1, "at least 1")
    expect("keep", keys.keep in KEEP, f"one of {', '.join(KEEP)}")
    whole = [seed for seed in keys.seeds if type(seed) is int and seed >= 0]
    expect("seeds", bool(whole) and whole == keys.seeds and len(set(whole)) == len(whole), "different whole numbers")
    higher_is_better = METRICS.get(keys.tune_by, METRICS["loss"]).better > 0
    expect("tune_by", not higher_is_better, "a metric of which less is better, such as class_loss or kl")
    expect("models", set(keys.models) <= set(MODELS), f"some of {', '.join(MODELS)}")
    expect("exclude", all(isinstance(rule, dict) for rule in keys.exclude), "a list of mappings from keys to labels")
    for key, values in keys.tune.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"Expected a list of values under `tune` for `{key}`, got {values!r}: add some.")
    if keys.models and not keys.evaluate:
        raise UserError("`models` are measured by `evaluate`, which is empty: give it tasks, or delete `models`.")
    if keys.devices_per_run > 1 and not keys.run_recipe.endswith("kd_distributed"):
        raise UserError(
            f"`devices_per_run: {keys.devices_per_run}` needs `run_recipe: torchtune_kd/kd_distributed`, got "
            f"{keys.run_recipe}: change one of them."
        )


def _single(cells: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    for name, overrides in cells.items():
        if not isinstance(overrides, Mapping):
            raise UserError(f"Expected `cells.{name}` to map dotted keys to values, got {overrides!r}: change it.")
    return {str(name): overrides for name, overrides in cells.items()}


def _base(name: str) -> DictConfig:
    """Read the runs' config, from a path or by a name that ``tune ls`` shows."""
    path = Path(name)
    if not path.is_file():
        entries = {
            config.name: config.file_path for recipe in recipe_registry().get_all_recipes() for config in recipe.configs
        }
        if name not in entries:
            raise UserError(
                f"`run_config` names {name}, which is no file and no config of `tune ls`: {nearest(name, entries)}"
            )
        path = Path(entries[name])
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # YAML's and OmegaConf's errors, and those of the file
        text = " ".join(str(error).split())[:300]
        raise UserError(f"The config {path} cannot be read, correct it: {text}") from error
    if not isinstance(config, DictConfig) or config.get("kd_loss") is None:
        raise UserError(
            f"Expected {path} to be a config of {' or '.join(RECIPES)}, but it has no `kd_loss`: name another."
        )
    return config
