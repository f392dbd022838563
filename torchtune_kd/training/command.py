"""What ``tune run`` calls: the command line and the config file become a config, every mistake one sentence."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from torchtune_kd.training.errors import UserError, one_sentence


def command(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """Decorate a recipe's main function: torchtune's ``config.parse`` and :func:`one_sentence`.

    What keeps a config from being read (no such file, YAML that is none, an override without ``=``, a ``${name}`` that
    is nowhere) is a :class:`UserError` as well.
    """
    parsed = False

    @config.parse
    @functools.wraps(recipe_main)  # argparse prints its docstring
    def run(cfg: DictConfig) -> Any:
        nonlocal parsed
        OmegaConf.to_container(cfg, resolve=True)
        parsed = True
        return recipe_main(cfg)

    @functools.wraps(recipe_main)
    @one_sentence
    def main() -> Any:
        nonlocal parsed
        parsed = False
        try:
            return run()
        except Exception as error:
            if parsed:
                raise
            text = " ".join(str(error).split())[:400].rstrip(".")
            raise UserError(
                f"The config of `{' '.join(sys.argv[1:])}` cannot be read, correct the command line or the file: "
                f"{type(error).__name__}: {text}."
            ) from error

    return main
