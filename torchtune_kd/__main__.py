"""``python -m torchtune_kd ls|cp|run|...``: torchtune's own command line with our recipes and configs in it.

The same as ``tune``, also where ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` keeps PyTorch from calling `register`.
"""

import sys

from torchtune_kd._registry import append_recipes, say_at_exit
from torchtune_kd._torchtune import prepare_import, recipe_registry, tune


def main() -> None:
    try:
        prepare_import()
        append_recipes(recipe_registry())
    except (ImportError, FileNotFoundError) as error:
        say_at_exit(error)
        sys.exit(1)
    tune()


if __name__ == "__main__":
    main()
