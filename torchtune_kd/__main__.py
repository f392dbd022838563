"""``python -m torchtune_kd ls|cp|run|...``: torchtune's own command line with our recipes and configs in it.

The same as ``tune``, also where ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` keeps PyTorch from calling `register`.
"""

import sys

from torchtune_kd._registry import append_recipes, say_at_exit
from torchtune_kd._torchtune import recipe_registry, tune
from torchtune_kd._versions import check_versions
from torchtune_kd._warnings import silence_known_warnings


def main() -> None:
    silence_known_warnings()  # also where PyTorch loads no plug-ins
    try:
        check_versions()
        append_recipes(recipe_registry())
    except (ImportError, FileNotFoundError) as error:
        say_at_exit(error)
        sys.exit(1)
    tune()


if __name__ == "__main__":
    main()
