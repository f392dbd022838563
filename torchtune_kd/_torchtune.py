"""The one gate to torchtune's private names: what has no public one there. The release that we pin is the last.

Nothing is imported before it is asked for: PyTorch loads our package at the end of every ``import torch``.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def prepare_import() -> None:
    """Do what has to come before torchtune and torchao are imported.

    Raises:
        ImportError: in one sentence, for versions that do not work together: torchtune's own failure with a wrong
            torchao says nothing.
    """
    from torchtune_kd._versions import check_versions
    from torchtune_kd._warnings import silence_known_warnings

    silence_known_warnings()  # also where PyTorch loads no plug-ins
    check_versions()


def component_from_path(dotted: str) -> Any:
    """Return the class or function that a ``_component_`` names.

    Raises:
        InstantiationError: of torchtune, if there is none.
    """
    from torchtune.config._utils import _get_component_from_path

    return _get_component_from_path(dotted)


def instantiation_error() -> type[Exception]:
    """Return what torchtune raises for a ``_component_`` that it cannot find."""
    from torchtune.config._errors import InstantiationError

    return InstantiationError


def prompt_template(template: Any) -> Any:
    """Return the prompt template that a tokenizer's argument names or is; None for None."""
    from torchtune.data._prompt_templates import _get_prompt_template

    return None if template is None else _get_prompt_template(template)


def keep_dequantised_weights_on_host(on: bool) -> None:
    """Let NF4 weights be dequantised for saving in host memory rather than on the device."""
    import torchtune.modules.common_utils as common_utils

    common_utils._use_low_cpu_ram = on


@contextlib.contextmanager
def writing_to(checkpointer: Any, folder: Path) -> Iterator[None]:
    """Let a checkpointer write below ``folder``, which is made, instead of the folder of its own making."""
    usual = checkpointer._output_dir
    folder.mkdir()
    checkpointer._output_dir = folder
    try:
        yield
    finally:
        checkpointer._output_dir = usual


def recipe_registry() -> Any:
    """Return the module with the list in which ``tune`` looks names up."""
    from torchtune import _recipe_registry

    return _recipe_registry


def tune() -> None:
    """Run torchtune's command line."""
    from torchtune._cli.tune import main

    main()
