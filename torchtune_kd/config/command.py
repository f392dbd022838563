"""What ``tune run`` calls: the command line and the config file become a config, every mistake one sentence."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from torchtune_kd.config.settings import KEYS, interpolated_names
from torchtune_kd.errors import UserError, exit_with_message


def command(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """Decorate a recipe's main function: torchtune's ``config.parse`` and :func:`exit_with_message`.

    What keeps a config from being read (no such file, YAML that is none, an override without ``=``, a ``${name}`` that
    is nowhere) is a :class:`UserError` as well. ``section=null`` on the command line makes a section null, of which
    torchtune makes a section without a component. A name of the file that other keys read (``${teacher_dir}``) may be
    left without a reader by the overrides: it is dropped.
    """
    parsed = False

    @config.parse
    @functools.wraps(recipe_main)  # argparse prints its docstring
    def run(cfg: DictConfig) -> Any:
        nonlocal parsed
        cfg = without_unread_names(_with_null_sections(cfg), _given_file())
        OmegaConf.to_container(cfg, resolve=True)
        parsed = True
        return recipe_main(cfg)

    @functools.wraps(recipe_main)
    @exit_with_message()
    def main() -> Any:
        nonlocal parsed
        parsed = False
        try:
            return run()
        except Exception as error:
            if parsed:
                raise
            text = " ".join(str(error).split())[:400].rstrip(".")
            if "in the form of key=value" in text:  # torchtune splits at every "="
                text += " (a value that holds `=` can stand in a YAML file alone: write one and give it as --config)"
            raise UserError(
                f"The config of `{' '.join(sys.argv[1:])}` cannot be read, correct the command line or the file: "
                f"{type(error).__name__}: {text}."
            ) from error

    return main


def _with_null_sections(cfg: DictConfig) -> DictConfig:
    for name, section in cfg.items_ex(resolve=False):
        if isinstance(section, DictConfig) and "_component_" in section and section["_component_"] is None:
            cfg[name] = None
    return cfg


def _given_file() -> DictConfig:
    """Read the file that ``--config`` names, without the overrides."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    file = OmegaConf.load(parser.parse_known_args()[0].config)
    return file if isinstance(file, DictConfig) else OmegaConf.create()  # torchtune has refused it already


def without_unread_names(cfg: DictConfig, file: DictConfig) -> DictConfig:
    """Leave out the names that keys of ``file`` read as ``${name}``, and that no key of ``cfg`` reads any more."""
    helpers = interpolated_names(file) - set(KEYS)
    unchanged = {name for name in helpers if name in file and name in cfg and cfg[name] == file[name]}
    while unread := (unchanged & {str(key) for key in cfg}) - interpolated_names(cfg):
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in unread])
    return cfg
