"""The stock `tune` command knows our recipes, and `import torch` pays next to nothing for it."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchtune_kd import _registry, _versions

RECIPE = """
import os, sys
line = " ".join(["ran", os.path.basename(__file__), str(os.environ.get("RANK")), *sys.argv[1:]])
os.write(1, f"{line}\\n".encode())  # at once: two processes write into one pipe
"""

# What `tune` does, with the recipes of a folder in place of the installed ones.
TUNE = """
import sys
from torchtune import _recipe_registry
from torchtune_kd._registry import append_recipes
append_recipes(_recipe_registry, sys.argv.pop(1), sys.argv.pop(1))
from torchtune._cli.tune import main
main()
"""


@dataclass
class Config:
    name: str
    file_path: str


@dataclass
class Recipe:
    name: str
    file_path: str
    configs: list = field(default_factory=list)
    supports_distributed: bool = False


@pytest.fixture
def registry():
    """A stand-in for torchtune._recipe_registry that holds one stock recipe."""
    return SimpleNamespace(
        Config=Config, Recipe=Recipe, _ALL_RECIPES=[Recipe("stock", "stock.py", [Config("a/b", "a/b.yaml")])]
    )


@pytest.fixture
def folders(tmp_path):
    """A recipes and a configs folder like ours."""
    recipes, configs = tmp_path / "some recipes", tmp_path / "configs"
    recipes.mkdir()
    for name in ("kd", "plan", "cache_teacher", "evaluate", "sweep", "compare", "inspect_tokens"):
        (recipes / f"{name}.py").write_text(RECIPE)
    for name in ("fam/x_single_device", "fam/deep/y_single_device", "fam/x_distributed", "fam/sweep_z", "fam/notes"):
        file = configs / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"name: {name}\n")
    return recipes, configs


def python(*args, cwd, **env):
    """Run Python elsewhere than in the checkout, as a user does."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **env}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_entries_follow_the_files(registry, folders):
    recipes, configs = folders
    _registry.append_recipes(registry, recipes, configs)
    stock, single, distributed, *others = registry._ALL_RECIPES
    assert stock.name == "stock" and len(stock.configs) == 1
    assert (single.name, single.supports_distributed) == ("torchtune_kd/kd_single_device", False)
    assert (distributed.name, distributed.supports_distributed) == ("torchtune_kd/kd_distributed", True)
    assert [config.name for config in single.configs] == [
        "torchtune_kd/fam/deep/y_single_device",
        "torchtune_kd/fam/x_single_device",
    ]
    assert [config.name for config in distributed.configs] == [
        "torchtune_kd/fam/x_distributed",
    ]
    assert [entry.name for entry in others] == [
        f"torchtune_kd/{name}" for name in ("plan", "cache_teacher", "evaluate", "sweep", "compare", "inspect")
    ]
    assert not any(entry.supports_distributed for entry in others)
    configs_of_others = {entry.name: [config.name for config in entry.configs] for entry in others if entry.configs}
    assert configs_of_others == {"torchtune_kd/sweep": ["torchtune_kd/fam/sweep_z"]}
    for entry in (single, distributed, *others, *single.configs, *distributed.configs):
        assert os.path.isabs(entry.file_path) and os.path.isfile(entry.file_path)


def test_appending_twice_changes_nothing(registry, folders):
    _registry.append_recipes(registry, *folders)
    before = list(registry._ALL_RECIPES)
    _registry.append_recipes(registry, *folders)
    assert before == registry._ALL_RECIPES


@pytest.mark.parametrize("missing", [0, 1])
def test_missing_folder_is_named(registry, folders, missing):
    folders = list(folders)
    folders[missing] = folders[missing] / "elsewhere"
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        _registry.append_recipes(registry, *folders)
    assert len(registry._ALL_RECIPES) == 1


def test_other_torchtune_is_left_alone(registry, folders, monkeypatch):
    monkeypatch.setattr(_versions, "version", {"torchtune": "0.7.0", "torchao": "0.15.0"}.__getitem__)
    with pytest.raises(ImportError, match=r"torchtune==0\.6\.1, but torchtune 0\.7\.0"):
        _registry.append_recipes(registry, *folders)
    assert len(registry._ALL_RECIPES) == 1


def test_installed_files_are_all_listed(registry):
    """Every installed YAML and recipe can be reached by a name, and every name leads to a file."""
    _registry.append_recipes(registry)
    entries = [entry for recipe in registry._ALL_RECIPES[1:] for entry in (recipe, *recipe.configs)]
    listed = {Path(entry.file_path) for entry in entries}
    recipes, configs = _registry._folder("recipes", None), _registry._folder("configs", None)
    there = {file for file in recipes.glob("*.py") if file.name != "__init__.py"}
    there |= set(configs.rglob("*.yaml"))
    assert listed == there
    assert len({entry.name for entry in entries}) == len(entries)


@pytest.mark.heavy
def test_register_in_a_program_that_imports_torch_alone(tmp_path):
    """Two small modules of ours, one finder, nothing of torchtune; the cost is printed, not asserted."""
    result = python(
        "-c",
        "import sys, torch, time\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "from torchtune_kd._registry import register\n"
        "register()\n"
        "spent = time.perf_counter() - start\n"
        "register()\n"
        "new = set(sys.modules) - before\n"
        "assert new == {'torchtune_kd', 'torchtune_kd._registry'}, new\n"
        "assert sum(getattr(f, '__name__', '') == '_RegistryFinder' for f in sys.meta_path) == 1\n"
        "assert not {'torchtune', 'torchao', 'omegaconf'} & set(sys.modules)\n"
        "print(f'register(): {spent * 1e3:.2f} ms')\n",
        cwd=tmp_path,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import torch; import torchtune._recipe_registry; r = torchtune._recipe_registry",
        "import sys; from torchtune._recipe_registry import Recipe; r = sys.modules[Recipe.__module__]",
        pytest.param("import torchtune; from torchtune import _recipe_registry as r", marks=pytest.mark.slow),
    ],
)
def test_whoever_imports_the_list_gets_one_module(tmp_path, imports):
    """PyTorch calls the entry point by itself here, and the module is the one Python would have loaded."""
    result = python(
        "-c",
        f"{imports}\n"
        "import inspect, sys, torchtune\n"
        "assert r is sys.modules['torchtune._recipe_registry'] is torchtune._recipe_registry\n"
        "assert 'class Recipe' in inspect.getsource(r)\n"
        "names = [recipe.name for recipe in r.get_all_recipes()]\n"
        "ours = ['plan', 'cache_teacher', 'evaluate', 'sweep', 'compare', 'inspect']\n"
        "ours = ['kd_single_device', 'kd_distributed', *ours]\n"
        "assert names[-8:] == [f'torchtune_kd/{name}' for name in ours], names\n"
        "assert len(set(names)) == len(names) and 'knowledge_distillation_distributed' in names\n"
        "from torchtune_kd._registry import register\n"
        "register()\n"
        "assert [recipe.name for recipe in r.get_all_recipes()] == names\n",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_list_imported_before_us_is_completed(tmp_path):
    result = python(
        "-c",
        "from torchtune._recipe_registry import get_all_recipes\n"
        "assert not any('torchtune_kd' in recipe.name for recipe in get_all_recipes())\n"
        "from torchtune_kd._registry import register\n"
        "register()\n"
        "assert get_all_recipes()[-7].name == 'torchtune_kd/kd_distributed'\n",
        cwd=tmp_path,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.heavy
def test_import_torch_survives_whatever_is_wrong(tmp_path):
    """A `tune` with an unreadable torchao: `import torch` works, and the last line says what is wrong."""
    broken = tmp_path / "site" / "torchao-0.18.0.dist-info"
    broken.mkdir(parents=True)
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.18.0\n")
    program = tmp_path / "tune"
    program.write_text("import torch\nprint('torch works')\n")
    result = python(program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0 and result.stdout == "torch works\n"
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("torchtune-kd: torchtune 0.6.1 needs torchao>=0.10,<0.16, but torchao 0.18.0 is installed")


@pytest.mark.heavy
def test_torch_without_torchtune(tmp_path):
    """No torchtune in reach: nothing is said and nothing fails."""
    result = python(
        "-c",
        "import sys\n"
        "class Hide:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torchtune':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide)\n"
        "import torch\n"
        "try:\n"
        "    import torchtune._recipe_registry\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n",
        cwd=tmp_path,
    )
    assert result.returncode == 0 and result.stderr == "" and result.stdout == "No module named 'torchtune'\n"


def tune(folders, *args, cwd, **env):
    return python("-c", TUNE, *folders, *args, cwd=cwd, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **env)


@pytest.mark.heavy
def test_tune_copies_by_name(folders, tmp_path):
    result = tune(folders, "cp", "torchtune_kd/fam/x_single_device", "mine.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mine.yaml").read_text() == "name: fam/x_single_device\n"


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["kd_single_device", "plan"])
def test_tune_runs_by_name(folders, tmp_path, recipe):
    """The recipe and the config are found by name, from a folder that has nothing to do with them."""
    config = folders[1] / "fam" / "x_single_device.yaml"
    args = (
        "run",
        f"torchtune_kd/{recipe}",
        "--config",
        "torchtune_kd/fam/x_single_device",
        "kd_ratio=1",
    )
    result = tune(folders, *args, cwd=tmp_path)
    file = "plan.py" if recipe == "plan" else "kd.py"
    assert result.stdout == f"ran {file} None --config {config} kd_ratio=1\n", result.stderr


@pytest.mark.slow
def test_tune_runs_by_name_under_torchrun(folders, tmp_path):
    config = folders[1] / "fam" / "x_distributed.yaml"
    args = (
        "--nproc_per_node",
        "2",
        "torchtune_kd/kd_distributed",
        "--config",
        "torchtune_kd/fam/x_distributed",
    )
    result = tune(folders, "run", *args, "x=1", cwd=tmp_path)
    ran = sorted(line for line in result.stdout.splitlines() if line.startswith("ran"))
    assert ran == [f"ran kd.py {rank} --config {config} x=1" for rank in (0, 1)], result.stderr


@pytest.mark.heavy
def test_compare_runs_without_a_config(folders, tmp_path):
    """`tune run` insists on one; it is given an empty one, before it looks."""
    (folders[0] / "compare.py").write_text(RECIPE)
    result = tune(folders, "run", "torchtune_kd/compare", "baseline=sft", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"ran compare.py None --config {os.devnull} baseline=sft\n"


@pytest.mark.heavy
@pytest.mark.parametrize("autoload", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_second_door(tmp_path, autoload):
    """`python -m torchtune_kd` is `tune`, with and without PyTorch's call of our entry point."""
    result = python("-m", "torchtune_kd", "ls", cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    assert result.returncode == 0, result.stderr
    names = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert names.count("torchtune_kd/kd_single_device") == names.count("torchtune_kd/kd_distributed") == 1
    assert "knowledge_distillation_single_device" in names
