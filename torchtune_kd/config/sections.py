"""A section of a config that names a component, and the component itself."""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import config
from torchtune.training import metric_logging

from torchtune_kd._torchtune import component_from_path, instantiation_error
from torchtune_kd.errors import UserError, nearest, one_line

# What components raise for values that cannot be, or where a file or a logger's package is not there.
_REFUSALS = (
    ValueError, TypeError, OSError, ImportError, KeyError, AttributeError, RuntimeError, ZeroDivisionError,
    instantiation_error(),
)  # fmt: skip
# torchtune's loggers that take any keyword and never read it
_SWALLOW_KEYS = (metric_logging.DiskLogger, metric_logging.TensorBoardLogger)


@dataclass(frozen=True)
class Section:
    """One ``_component_`` and its keyword arguments.

    Attributes:
        path (str): dotted key of the section, for messages.
        component (str): dotted path of a class or function.
        arguments (Mapping[str, Any]): plain values.
    """

    path: str
    component: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` where the section does not give it."""
        return self.arguments.get(key, default)

    def changed(self, **arguments: Any) -> "Section":
        """Return the section with other arguments."""
        return replace(self, arguments={**self.arguments, **arguments})

    @property
    def plain(self) -> dict[str, Any]:
        """Return the section as YAML gives it."""
        return {"_component_": self.component, **self.arguments}

    def resolve(self) -> Any:
        """Return the class or function that the section names.

        Raises:
            UserError: if there is none.
        """
        return component_of(self.path, self.component)

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Return what the component can be given by name."""
        return inspect.signature(self.resolve()).parameters

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Instantiate the component.

        Raises:
            UserError: for what it refuses, as one sentence that names the section.
        """
        try:
            return config.instantiate(OmegaConf.create(self.plain), *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            given = f" from {said}" if isinstance(error, TypeError) and (said := self._plain_values()) else ""
            reason = f"{type(error).__name__} {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"The section `{self.path}` cannot be built{given}, correct it: {reason}") from error

    def _plain_values(self) -> str:
        values = {key: value for key, value in self.arguments.items() if not hasattr(value, "keys")}
        return ", ".join(f"{key}={value!r}" for key, value in values.items())


def section_of(path: str, node: Any) -> Section:
    """Read what stands where a component belongs.

    Raises:
        UserError: if it is no section, or names no component.
    """
    if not isinstance(node, Mapping | DictConfig):
        raise UserError(f"Expected `{path}` to be a section with a `_component_`, got {node!r}: write one.")
    plain = plain_values(node) if isinstance(node, DictConfig) else dict(node)
    component = plain.pop("_component_", None)
    if not isinstance(component, str):
        raise UserError(
            f"Expected `{path}._component_` in the config, but it is missing: name what builds the section."
        )
    return Section(path, component, plain)


def plain_values(node: DictConfig) -> dict[str, Any]:
    """Return a section, or a whole config, as Python's own values, interpolations filled in."""
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def sections_of(path: str, node: Any) -> tuple[Section, ...]:
    """Read one section, or a list of them, as torchtune's recipes take datasets; a null gives none."""
    if node is None:
        return ()
    if isinstance(node, ListConfig | list):
        if not node:
            raise UserError(
                f"Expected at least one section under `{path}`, got an empty list: add one or delete the key."
            )
        return tuple(section_of(f"{path}[{index}]", part) for index, part in enumerate(node))
    return (section_of(path, node),)


def components_in(node: Any, path: str = "") -> Iterator[Section]:
    """Yield every section with a ``_component_``, at any depth."""
    if isinstance(node, DictConfig):
        if "_component_" in node:
            yield section_of(path, node)
        for key in node:
            yield from components_in(node[key], f"{path}.{key}" if path else str(key))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from components_in(item, f"{path}[{index}]")


def component_of(path: str, component: str) -> Any:
    """Return the class or function of a dotted path, which the section ``path`` names."""
    try:
        return component_from_path(component)
    except Exception as error:
        raise UserError(
            f"`{path}._component_` names {component}, which cannot be found: {_hint(component, error)}"
        ) from error


def check_component(section: Section) -> None:
    """Check that the component exists and takes every keyword that the section gives."""
    component = section.resolve()
    try:
        parameters = section.parameters()
    except ValueError:  # some builtins have no signature
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and component not in _SWALLOW_KEYS
    for key in section.arguments:
        if key in parameters:
            continue
        if takes_any and not difflib.get_close_matches(str(key), parameters, n=1, cutoff=0.8):
            continue  # handed on, as a dataset does to load_dataset; torchtune's loggers swallow it
        raise UserError(
            f"Unknown key `{section.path}.{key}`: {section.component} does not take it, {nearest(key, parameters)}"
        )


def _hint(dotted: str, error: Exception) -> str:
    """Name the nearest name in the module, where there is that module, else what the import said."""
    module, _, name = dotted.rpartition(".")
    try:
        names = dir(importlib.import_module(module))
    except (ImportError, ValueError):
        names = []
    close = [known for known in names if known.lower() == name.lower()] or difflib.get_close_matches(name, names, n=1)
    return f"did you mean {module}.{close[0]}?" if close else one_line(error.__cause__ or error)
