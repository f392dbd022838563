"""Makes the stock ``tune`` command list, copy and run our recipes and configs.

torchtune has no plug-in hook: its command looks names up in `torchtune._recipe_registry._ALL_RECIPES`.
PyTorch calls every entry point of the group ``torch.backends`` at the end of ``import torch``, and torchtune
imports torch before it imports that list. `register` therefore puts a finder into `sys.meta_path` which waits
for ``torchtune._recipe_registry`` and appends our entries as soon as torchtune itself has filled the list.

It runs in every program that imports torch, so it does no more than that: no file is read and nothing is
imported until somebody asks for torchtune's list. torchtune joins an entry's path to its own folder, and
joining a path with an absolute one keeps the absolute one, so absolute paths are all that is needed.
"""

import os
import sys
from functools import cache

_REGISTRY = "torchtune._recipe_registry"  # a name alone: nothing of ours or torchtune's is imported for it
_PREFIX = "torchtune_kd/"
# each recipe's file, and the names of its configs; where there are none, it takes those of the others, which `tune run`
# finds for it
_RECIPES = {
    "kd_single_device": ("kd.py", "*_single_device.yaml"),
    "kd_distributed": ("kd.py", "*_distributed.yaml"),
    "plan": ("plan.py", None),
    "cache_teacher": ("cache_teacher.py", None),
    "evaluate": ("evaluate.py", "evaluate*.yaml"),
    "sweep": ("sweep.py", "sweep*.yaml"),
    "compare": ("compare.py", None),
    "inspect": ("inspect_tokens.py", None),  # inspect.py would hide the standard library's from what torchrun starts
}


def register() -> None:
    """Entry point ``torch.backends``. Calling it again changes nothing; it never raises."""
    if _RegistryFinder not in sys.meta_path:
        sys.meta_path.insert(0, _RegistryFinder)
    if _REGISTRY in sys.modules:
        _or_say_why(append_recipes, sys.modules[_REGISTRY])
    program = str((getattr(sys, "argv", None) or [""])[0])
    if program.endswith(("/tune", "\\tune", "\\tune.exe")):
        # With a torchao it cannot live with, torchtune ends in a traceback before it reaches its list.
        from torchtune_kd._torchtune import prepare_import

        _or_say_why(prepare_import)


def append_recipes(registry, recipes_folder=None, configs_folder=None) -> None:
    """Append our entries to torchtune's list, where it does not hold them yet.

    ``tune`` imports the list before it reads its command line, so that this is also where that is completed.

    Args:
        registry: the module `torchtune._recipe_registry`.
        recipes_folder (str | Path | None): folder of the recipe files; None for the installed one.
        configs_folder (str | Path | None): folder with a folder of YAML files per model family; None for the
            installed one.

    Raises:
        ImportError: if torchtune or torchao is another version than torchtune-kd works with.
        FileNotFoundError: if a folder is not there.
    """
    from torchtune_kd._versions import check_versions

    check_versions()
    recipes = _folder("recipes", recipes_folder)
    configs = _folder("configs", configs_folder)
    files = sorted(configs.rglob("*.yaml"))
    known = {recipe.name for recipe in registry._ALL_RECIPES}
    for recipe, (file_name, pattern) in _RECIPES.items():
        if _PREFIX + recipe in known:
            continue
        entries = [
            registry.Config(name=_PREFIX + file.relative_to(configs).with_suffix("").as_posix(), file_path=str(file))
            for file in files
            if pattern is not None and file.match(pattern)
        ]
        registry._ALL_RECIPES.append(
            registry.Recipe(
                name=_PREFIX + recipe,
                file_path=str(recipes / file_name),
                configs=entries,
                supports_distributed=recipe == "kd_distributed",
            )
        )
    _add_config()


def _add_config() -> None:
    """Give ``tune run``, which refuses to start without a config, an empty one for a recipe that needs none."""
    if sys.argv[1:3] == ["run", f"{_PREFIX}compare"] and "--config" not in sys.argv:
        sys.argv[3:3] = ["--config", os.devnull]


class _RegistryFinder:
    """Finds torchtune's list where Python would, and appends to it once it is executed."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != _REGISTRY:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None  # not torchtune as we know it: leave it to the other finders
        execute = spec.loader.exec_module

        def execute_and_append(module):
            execute(module)
            _or_say_why(append_recipes, module)

        spec.loader.exec_module = execute_and_append
        return spec


def _or_say_why(action, *args) -> None:
    """Call ``action``; whatever is wrong with us, ``import torch`` and torchtune's own recipes must go on working."""
    try:
        action(*args)
    except Exception as error:
        say_at_exit(error)


def say_at_exit(error: Exception) -> None:
    """Print an error's sentence once, as the last line of the program: below the traceback it explains."""
    _say_once(f"torchtune-kd: {error}")


@cache
def _say_once(sentence: str) -> None:
    import atexit

    atexit.register(lambda: print(sentence, file=sys.stderr))


def _folder(name: str, given):
    """Return a folder of ours: a wheel holds it in the package, an editable install maps it from the repository."""
    from importlib.util import find_spec
    from pathlib import Path

    if given is None:
        spec = find_spec(f"torchtune_kd.{name}")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"torchtune_kd.{name} was not found, but {Path(__file__).parent} was: install torchtune-kd, "
                "and with a wheel install start Python outside the source checkout."
            )
        given = spec.submodule_search_locations[0]
    folder = Path(given).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of torchtune-kd's {name} is not there: {folder}.")
    return folder
