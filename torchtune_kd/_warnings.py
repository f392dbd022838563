"""Keeps known warnings of other packages out of our programs' output; whatever else is warned of still appears.

They appear with every version that is tested, before a program's own first line, and a user can do nothing about them:

- torchao logs that it skips its optional C++ kernels, which were compiled for another PyTorch. Nothing here uses them.
- PyTorch warns that a norm of fp32 activations beside bf16 weights takes no fused path. torchtune's norms do that.
- PyTorch warns of a deprecated call that torchdata's loader makes.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath

_RECIPES = ("kd_single_device", "kd_distributed", "plan", "evaluate", "sweep", "compare", "inspect")
_FILES = ("kd", "plan", "evaluate", "sweep", "compare", "inspect_tokens")
_TORCHAO = "Skipping import of cpp extensions due to incompatible torch version"
_NORMS = "Mismatch dtype between input and weight"
_LOADER = "'set_vital' is deprecated"


@cache
def silence_known_warnings() -> None:
    """Silence them in this process, if it runs one of our programs.

    It has to be called before torchao is imported. The warnings of a program that only imports us are its user's.
    """
    if not is_our_program(sys.orig_argv):
        return
    logging.getLogger("torchao").addFilter(_is_news)
    warnings.filterwarnings("ignore", message=_NORMS, category=UserWarning, module=r"torch\.nn\.functional$")
    warnings.filterwarnings("ignore", message=_LOADER, category=UserWarning, module=r"torchdata\.")


def is_our_program(command: Sequence[str]) -> bool:
    """Return whether a command line starts a recipe by its name or file, or one of our modules with ``-m``."""
    named = {f"torchtune_kd/{recipe}" for recipe in _RECIPES}
    files = {("recipes", f"{file}.py") for file in _FILES}  # torchrun starts its workers so
    return any(
        word in named or PurePath(word).parts[-2:] in files or (before == "-m" and word.split(".")[0] == "torchtune_kd")
        for before, word in zip(["", *command], command, strict=False)
    )


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_TORCHAO)
