"""Read what is asked for: the config of a run, and what the options say beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from torchtune_kd._torchtune import recipe_registry
from torchtune_kd.config.reading import Config, read_run_config
from torchtune_kd.errors import UserError, first_line, nearest
from torchtune_kd.tools.importing.told import SMALLEST_TAIL


@dataclass(frozen=True)
class Options:
    """Say what a source is read by, and how much of the data it has to cover.

    Attributes:
        teacher_name (str | None): kept in the manifest.
        overwrite (bool): replace a cache.
        partial (bool): also where some rows of the data are not in the source.
        smallest_tail (float): a mass of the rest below is not known.
        compression (Path | None): of DistillKit, where it does not lie beside the files.
        exact_only (bool): of DistillKit: leave out the ids whose log-probabilities were fitted.
        ambiguous_to_rest (bool): of OpenAI's API: leave a listed token out whose text is not that of one id.
        logprobs_field (str): of axolotl: its key of that name.
        messages_field (str): of axolotl: its ``field_messages``.
        layer (int): of vLLM's hidden states: which of a file's layers.
        dtype (str): of hidden states, as they are to be stored.
    """

    teacher_name: str | None = None
    overwrite: bool = False
    partial: bool = False
    smallest_tail: float = SMALLEST_TAIL
    compression: Path | None = None
    exact_only: bool = False
    ambiguous_to_rest: bool = False
    logprobs_field: str = "logprobs"
    messages_field: str = "messages"
    layer: int = -1
    dtype: str = "bf16"


@dataclass(frozen=True)
class Request:
    """Hold what is to be imported.

    Attributes:
        format (str): one of :data:`~torchtune_kd.tools.importing.run.FORMATS`.
        source (Path): file or folder.
        output (Path): the cache's folder.
        config (Config): of the run that is to read it.
        options (Options): the rest.
    """

    format: str
    source: Path
    output: Path
    config: Config
    options: Options = field(default_factory=Options)


def read_request(
    format: str, source: Path, output: Path, config: str | DictConfig, overrides: Sequence[str], options: Options
) -> Request:
    """Read the config of the run that is to distil from the imported cache.

    Args:
        format (str): of the source.
        source (Path): file or folder.
        output (Path): the cache's folder.
        config (str | DictConfig): a file, a name that ``tune ls`` shows, or what it holds.
        overrides (Sequence[str]): ``key=value`` for some of its keys.
        options (Options): the rest.

    Raises:
        UserError: for a config, a source or a value that cannot be.
    """
    if not source.exists():
        raise UserError(f"Expected a file or a folder to import, but {source} is none: check the path.")
    if not 0 <= options.smallest_tail < 1:
        raise UserError(f"Expected --smallest-tail from 0 to 1, got {options.smallest_tail:g}: change it.")
    written = _with_overrides(config if isinstance(config, DictConfig) else _load(config), overrides)
    if written.get("teacher_model") is None and written.get("teacher_cache") is None:
        written = OmegaConf.merge(written, {"teacher_cache": str(output)})
        assert isinstance(written, DictConfig)
    return Request(format, source, output, read_run_config(written, ()), options)


def _load(name: str) -> DictConfig:
    path = Path(name)
    if not path.is_file():
        entries = {
            config.name: config.file_path for recipe in recipe_registry().get_all_recipes() for config in recipe.configs
        }
        if name not in entries:
            raise UserError(
                f"Expected --config to be a file or a config of `tune ls`, but {name} is none: {nearest(name, entries)}"
            )
        path = Path(entries[name])
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # YAML's and OmegaConf's errors, and those of the file
        raise UserError(f"The config {path} cannot be read, correct it: {first_line(error)}.") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"Expected a config with keys, but {path} has none: name another.")
    return config


def _with_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise UserError(f"Expected key=value for a key of the config, got {override}: correct it.")
    merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(merged, DictConfig)
    return merged
