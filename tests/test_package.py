"""The package is the tree: every folder and YAML is shipped, imports only point down, windows are true."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import torchtune_kd
from torchtune_kd import _versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest under Python 3.10

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = {"torchtune_kd": "torchtune_kd"} | SETUPTOOLS["package-dir"]  # package: folder

# What each room may import of ours, beside itself and EVERYWHERE; from the ground up, see docs/architecture.md.
EVERYWHERE = {"torchtune_kd", "_versions", "_warnings", "_torchtune"}
_PARTS = {"losses", "config", "distributed", "data", "models"}
_LOOP = {"kernels", "storage", *_PARTS, "caches", "teachers", "checkpoints"}
FLOORS = {
    "kernels": set(),  # by relative imports alone: the folder is copied into other projects
    "errors": set(),
    "reports": {"errors"},
    "storage": {"errors"},
    "generation": {"errors"},
    "losses": {"kernels"},
    "config": {"errors", "losses"},
    "distributed": {"errors", "config"},
    "data": {"errors", "config", "distributed"},
    "models": {"errors", "kernels", "losses", "config", "distributed", "data"},
    "caches": {"errors", "storage", "data"},
    "teachers": {"errors", "kernels", "storage", "caches", *_PARTS},
    "checkpoints": {"errors", "storage", "config", "distributed", "data", "models"},
    "training": {"errors", *_LOOP},
    "plan": {"errors", "training", *_LOOP},
    "evaluation": {"errors", "kernels", *_PARTS, "generation", "reports", "storage"},
    "cache_teacher": {"errors", "training", *_LOOP},
    "sweeps": {"errors", "training", "plan", "evaluation", "reports", *_LOOP},
    "tools": {"errors", "generation", "reports", *_LOOP} - {"kernels", "losses", "teachers"},
    "demo": {"errors", "training", "plan", "evaluation", "tools", "generation", "reports", *_LOOP},
    "recipes": {"errors", "training", "cache_teacher", "plan", "evaluation", "sweeps", "reports", *_LOOP},
    "configs": set(),
    "launch": set(),
    # loaded by every `import torch`
    "_registry": set(),
    "__main__": {"_registry"},
    "_versions": set(),
    "_warnings": set(),
    "_torchtune": set(),
}
# what a laptop reads logs and draws pictures with
WITHOUT_TORCH = {"reports", "configs", "launch", "_registry", "__main__", "_versions", "_warnings", "_torchtune"}


def modules():
    """Every shipped Python file as (module name, file); a package's name is that of its folder."""
    for package, folder in MAPPED.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), file


MODULES = list(modules())


def imports(module, file):
    """The absolute names that a file imports anywhere in it, with their lines; dots of relative ones resolved."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*up, base)) if base else ".".join(up)
            # `from torchtune_kd import losses` imports torchtune_kd.losses
            for alias in node.names:
                yield (f"{base}.{alias.name}" if base == "torchtune_kd" else base), node.lineno


def room(module):
    """`torchtune_kd.losses.base` -> `losses`; `torchtune_kd` -> itself."""
    return module.split(".")[1] if "." in module else module


def test_package_list_equals_the_tree():
    found = {module for module, file in MODULES if file.name == "__init__.py"}
    assert sorted(found) == sorted(SETUPTOOLS["packages"]) == SETUPTOOLS["packages"]


def test_every_folder_with_python_is_a_package():
    folders = {file.parent for _, file in MODULES}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_the_walk_sees_the_tree():
    """The tests below are empty where this one fails."""
    assert {room(module) for module, _ in MODULES} == {*FLOORS, "torchtune_kd"}
    assert "torch" in {name for module, file in MODULES for name, _ in imports(module, file)}


@pytest.mark.parametrize("module, file", MODULES, ids=[module for module, _ in MODULES])
def test_imports_only_point_down(module, file):
    here = room(module)
    allowed = FLOORS.get(here, set()) | {here} | (set() if here == "kernels" else EVERYWHERE)
    wrong = []
    for name, line in imports(module, file):
        top = name.partition(".")[0]
        leaves = top == "torchtune_kd" and name != "torchtune_kd.__version__" and room(name) not in allowed
        if leaves or top in {"tests", "benchmarks", "unittest"} or (top == "torch" and here in WITHOUT_TORCH):
            wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_floors_hold_no_circle():
    """Every room can be built after the rooms that it may import."""
    built = set()
    while ready := {name for name, below in FLOORS.items() if name not in built and below <= built}:
        built |= ready
    assert built == set(FLOORS)


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=module) for module, file in MODULES if module.startswith("torchtune_kd.kernels")],
)
def test_kernels_stand_alone(file):
    """The folder can be copied: relative imports that stay in it, the standard library, torch and Triton."""
    depth = len(file.relative_to(ROOT / MAPPED["torchtune_kd.kernels"]).parts)
    tree = ast.walk(ast.parse(file.read_text()))
    names = set()
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= depth, f"line {node.lineno} leaves the folder"
    assert names <= {"torch", "triton"} | sys.stdlib_module_names


@pytest.mark.heavy
def test_kernels_work_without_torchtune(tmp_path):
    code = "import sys, torchtune_kd.kernels; sys.exit('torchtune' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.py")), ids=lambda file: file.name)
def test_recipes_stay_readable(file):
    assert len(file.read_text().splitlines()) <= 300


def declared(requirements):
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_what_is_imported_is_declared():
    """No import leans on what another package happens to bring along."""
    distributions = packages_distributions()
    imported = set()
    for module, file in MODULES:
        for name, _ in imports(module, file):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "torchtune_kd":
                imported |= {found.lower().replace("_", "-") for found in distributions.get(top, [top])}
    project = PROJECT["project"]
    stated = declared(project["dependencies"])
    stated |= {name for extra in ("demo", "evaluate") for name in declared(project["optional-dependencies"][extra])}
    assert imported <= stated


def test_version_checks_are_the_windows():
    assert {_versions.TORCHTUNE_PIN, _versions.TORCHAO_PIN} <= set(PROJECT["project"]["dependencies"])


def requirements(lines: Iterable[str]) -> dict[str, SpecifierSet]:
    found = map(Requirement, (line for line in lines if line.strip() and not line.startswith("#")))
    return {requirement.name.lower().replace("_", "-"): requirement.specifier for requirement in found}


def constraints(name: str) -> dict[str, SpecifierSet]:
    return requirements((ROOT / name).read_text().splitlines())


def windows() -> dict[str, SpecifierSet]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    found = requirements([*project["dependencies"], *(line for extra in extras.values() for line in extra)])
    del found["torchtune-kd"]
    return found


def test_constraints_lie_in_the_windows():
    """Each exact version of constraints.txt satisfies the window that pyproject.toml states."""
    pins = constraints("constraints.txt")
    for name, window in windows().items():
        assert all(window.contains(bound.version) for bound in pins[name]), name


def test_the_oldest_constraints_are_the_lower_ends_of_the_windows():
    pins = constraints("constraints-oldest.txt")
    tools = {"kernels", "pre-commit", "pyright", "ruff"}  # no fast test needs these
    tools |= {"lm-eval", "scikit-learn", "scipy", "tzdata"}  # nor these: tests that do are skipped
    tools |= declared(PROJECT["project"]["optional-dependencies"]["docs"])
    for name, window in windows().items():
        if name not in tools:
            (pin,) = pins[name]
            (lowest,) = (bound.version for bound in window if bound.operator in (">=", "=="))
            assert f"{pin.version}.".startswith(f"{lowest}."), name
            assert window.contains(pin.version), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what git would check out here, so that the checkout stays clean."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        *(folder.split("/")[0] for folder in MAPPED.values()),
    }:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    # without the tree in sys.path: setuptools asks Hugging Face's `kernels`, where that is installed, for a plug-in
    build = "import sys; sys.path.remove(''); from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.heavy
def test_wheel_holds_the_tree(wheel):
    """Every module, every YAML and the licence; nothing of the tests and benchmarks."""
    assert wheel.name == f"torchtune_kd-{torchtune_kd.__version__}-py3-none-any.whl"
    expected = set()
    for package, folder in MAPPED.items():
        files = [file for kind in ("*.py", "*.yaml", "*.slurm", "py.typed") for file in (ROOT / folder).rglob(kind)]
        expected |= {"/".join((*package.split("."), *file.relative_to(ROOT / folder).parts)) for file in files}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected.add("torchtune_kd/launch/README.md")
    assert {name for name in names if not name.endswith("metadata.json")} == expected
    assert any(name.endswith("/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_wheel_in_the_stock_command(wheel, tmp_path):
    """`tune ls` and `tune cp` find our files in an installed wheel, from a folder of the user's."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    recipe = site / "torchtune_kd" / "recipes" / "kd.py"
    recipe.write_text(recipe.read_text() + "# the wheel's\n")
    tune = f"import sys; sys.path.insert(0, {str(site)!r}); from torchtune._cli.tune import main; main()"

    def run(*args):
        command = [sys.executable, "-c", tune, *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True).stdout

    listed = re.findall(r"torchtune_kd/\S+", run("ls"))
    expected = {
        "kd_single_device",
        "kd_distributed",
        "plan",
        "cache_teacher",
        "evaluate",
        "sweep",
        "compare",
        "inspect",
    }
    expected |= {str(file.relative_to(ROOT / "configs").with_suffix("")) for file in (ROOT / "configs").rglob("*.yaml")}
    assert sorted(listed) == sorted(f"torchtune_kd/{name}" for name in expected)
    run("cp", "torchtune_kd/kd_distributed", "mine.py")
    assert (tmp_path / "mine.py").read_text() == recipe.read_text()
