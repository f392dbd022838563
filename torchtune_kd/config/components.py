"""The components of a config: that each exists and takes what its section gives."""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.training import metric_logging

from torchtune_kd.errors import UserError, nearest, one_line
from torchtune_kd.losses import KDLoss, KDWithChunkedOutputLoss


def sections(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every section with a ``_component_``, at any depth, with its dotted path."""
    if isinstance(node, DictConfig):
        if "_component_" in node:
            yield path, node
        for key in node:
            yield from sections(node[key], f"{path}.{key}" if path else str(key))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from sections(item, f"{path}[{index}]")


def check_section(name: str, section: Any) -> None:
    """What stands where a component belongs is null, a section that names one, or, of datasets, a list of these."""
    if section is None:
        return
    if isinstance(section, ListConfig) and name.startswith("dataset"):
        for index, part in enumerate(section):
            check_section(f"{name}[{index}]", part)
        return
    if not isinstance(section, DictConfig):
        raise UserError(f"Expected `{name}` to be a section with a `_component_`, got {section!r}: write one.")
    if not isinstance(section.get("_component_"), str):
        raise UserError(
            f"Expected `{name}._component_` in the config, but it is missing: name what builds the section."
        )


def check_kd_loss(section: DictConfig) -> None:
    """The section ``kd_loss`` names a loss that works from hidden states."""
    component = component_of("kd_loss", section)
    if inspect.isclass(component) and issubclass(component, KDWithChunkedOutputLoss):
        raise UserError(
            f"`kd_loss._component_` is {section['_component_']}, which is for torchtune's own recipes; this one never "
            f"holds full logits, so write {section['_component_'].replace('WithChunkedOutputLoss', 'Loss')} and "
            "delete `kd_loss.num_output_chunks`."
        )
    if not (inspect.isclass(component) and issubclass(component, KDLoss)) or component is KDLoss:
        raise UserError(
            f"Expected a loss of torchtune_kd.losses under `kd_loss`, got {section['_component_']}: "
            "write for example `kd_loss._component_: torchtune_kd.losses.ForwardKLLoss`."
        )


def component_of(path: str, section: DictConfig) -> Any:
    """The class or function that the section under ``path`` names."""
    from torchtune.config._utils import _get_component_from_path  # torchtune's own resolver; it has no public name

    dotted = section["_component_"]
    try:
        return _get_component_from_path(dotted)
    except Exception as error:
        raise UserError(
            f"`{path}._component_` names {dotted}, which cannot be found: {_hint(dotted, error)}"
        ) from error


def _hint(dotted: str, error: Exception) -> str:
    """The nearest name in the module, where there is that module, else what the import said."""
    module, _, name = dotted.rpartition(".")
    try:
        names = dir(importlib.import_module(module))
    except (ImportError, ValueError):
        names = []
    close = [known for known in names if known.lower() == name.lower()] or difflib.get_close_matches(name, names, n=1)
    return f"did you mean {module}.{close[0]}?" if close else one_line(error.__cause__ or error)


def check_component(path: str, section: DictConfig) -> None:
    """The component exists and takes every keyword that the section gives."""
    component = component_of(path, section)
    try:
        parameters = inspect.signature(component).parameters
    except ValueError:  # some builtins have no signature
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and component not in _SWALLOW_KEYS
    for key in section:
        if key == "_component_" or key in parameters:
            continue
        if takes_any and not difflib.get_close_matches(str(key), parameters, n=1, cutoff=0.8):
            continue  # handed on, as a dataset does to load_dataset; torchtune's loggers swallow it
        raise UserError(
            f"Unknown key `{path}.{key}`: {section['_component_']} does not take it, {nearest(key, parameters)}"
        )


# torchtune's loggers that take any keyword and never read it
_SWALLOW_KEYS = (metric_logging.DiskLogger, metric_logging.TensorBoardLogger)


# What components raise for values that cannot be, or where a file or a logger's package is not there.
_REFUSALS = (
    ValueError, TypeError, OSError, ImportError, KeyError, AttributeError, RuntimeError, ZeroDivisionError,
    InstantiationError,
)  # fmt: skip


def build(cfg: Mapping[str, Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the component under ``cfg.<name>``; what it refuses becomes one sentence that names the section."""
    try:
        return config.instantiate(cfg[name], *args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        given = f" from {described}" if isinstance(error, TypeError) and (described := _plain_values(cfg[name])) else ""
        reason = f"{type(error).__name__} {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"The section `{name}` cannot be built{given}, correct it: {reason}") from error


def build_kd_loss(cfg: DictConfig) -> KDLoss:
    """The loss component under ``kd_loss``, one of ``torchtune_kd.losses``.

    Raises:
        UserError: for a temperature or beta out of range.
    """
    return build(cfg, "kd_loss")


def _plain_values(section: Any) -> str:
    """What a section gives besides components, as Python writes it."""
    if not isinstance(section, DictConfig):
        return ""
    plain = {key: value for key, value in section.items() if key != "_component_" and not hasattr(value, "keys")}
    return ", ".join(f"{key}={value!r}" for key, value in plain.items())
