"""READMEs and docs: links lead somewhere, both languages say the same commands, and what is copied is up to date."""

import importlib
import importlib.util
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchtune_kd import evaluation
from torchtune_kd.cache_teacher.request import CacheKeys
from torchtune_kd.config import settings
from torchtune_kd.config.teachers import TeacherEntry
from torchtune_kd.evaluation import inspection
from torchtune_kd.plan import Request

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# read by people in the repository; those of docs/ also by MkDocs
TEXTS = [
    *READMES,
    *PAGES,
    *(
        ROOT / name
        for name in (
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "benchmarks/README.md",
            "examples/README.md",
            "kernels/README.md",
        )
    ),
    *(ROOT / "torchtune_kd" / room / "README.md" for room in ("demo", "launch")),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PICTURE = "docs/images/curves.png"


def without_code(text):
    """The text without fenced, indented and inline code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def anchors(text):
    """The names that GitHub and MkDocs give the headings of a page."""
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        names.add(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-"))
    return names


def code_blocks(text):
    """The indented lines of a text, without comments and the space before them."""
    lines = (re.sub(r"\s+# .*$", "", line) for line in text.splitlines() if line.startswith("    "))
    return [line for line in lines if line.strip()]


def commands(text):
    """Return what a reader types: indented lines, continued ones as one, and inline code, without comments."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in code_blocks(text)]
    lines += re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
    found = (re.sub(r"\s+# .*$", "", " ".join(line.split())) for line in lines)
    return [line for line in found if re.match(r"(\w+=\S+ )?(python -m|tune (run|cp|ls)|make|pytest) \S", line)]


COMMANDS = sorted({command for file in TEXTS for command in commands(file.read_text())})


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for link in LINK.findall(without_code(file.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.is_file(), f"{link} in {file.name}"
        if anchor:
            included = re.findall(r'^--8<-- "(.+)"$', target.read_text(), flags=re.MULTILINE)
            texts = [target.read_text(), *((ROOT / name).read_text() for name in included)]
            assert any(anchor in anchors(text) for text in texts), f"{link} in {file.name}"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_pages_link_to_pages_alone(file):
    """MkDocs publishes docs/ and nothing else."""
    for link in LINK.findall(without_code(file.read_text())):
        path = link.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            assert (file.parent / path).resolve().is_relative_to(ROOT / "docs"), f"{link} in {file.name}"


@pytest.mark.parametrize("file", READMES, ids=lambda file: file.name)
def test_readmes_are_short_and_show_the_picture(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, (line for line in lines if not line.startswith("![")))) <= 130
    (place,) = (number for number, line in enumerate(lines) if f"]({PICTURE})" in line)
    assert place < 40  # before the second screen
    assert (ROOT / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_both_readmes_have_the_same_commands_and_links():
    english, korean = (file.read_text() for file in READMES)
    assert code_blocks(english) == code_blocks(korean)
    links = [sorted(LINK.findall(text)) for text in (english, korean)]
    assert [link for link in links[0] if link != "README.ko.md"] == [link for link in links[1] if link != "README.md"]
    assert {"README.ko.md"} <= set(links[0]) and {"README.md"} <= set(links[1])


def test_the_kernels_example_runs_as_it_stands():
    """Logits and hidden states of 5 tokens, 7 ids."""
    text = READMES[0].read_text().partition("## The kernels alone")[2].partition("\n\nTriton")[0]
    head = torch.nn.Linear(4, 7, bias=False)
    names = {
        "student_logits": torch.randn(5, 7, requires_grad=True),
        "teacher_logits": torch.randn(5, 7),
        "student_hidden": torch.randn(5, 4, requires_grad=True),
        "teacher_hidden": torch.randn(5, 4),
        "labels": torch.randint(7, (5,)),
        "student": SimpleNamespace(lm_head=head),
        "teacher": SimpleNamespace(lm_head=torch.nn.Linear(4, 7, bias=False)),
    }
    exec(textwrap.dedent(text), names)
    assert names["student_hidden"].grad is not None and head.weight.grad is not None
    assert names["metrics"]["num_tokens"] == 5


def test_every_key_of_a_config_is_explained():
    text = "\n".join(page.read_text() for page in PAGES) + (ROOT / "torchtune_kd" / "launch" / "README.md").read_text()
    keys = [field.name for field in fields(settings.Settings)] + list(settings.COMPONENTS)
    keys += ["teacher_cache", "teacher_head", "teacher_tail", "teacher_weights", "teachers", "ensemble", "self"]
    keys += [field.name for field in fields(TeacherEntry) if field.name not in ("path", "own")]
    keys += [f"cache.{field.name}" for field in fields(CacheKeys)]
    assert [key for key in keys if f"`{key}" not in text] == []


def test_python_one_liners_import_what_is_there():
    """In texts, and in the comments of configs: ``python -c "from module import name; ..."``."""
    files = [*TEXTS, *(ROOT / "configs").rglob("*.yaml")]
    found = {pair for file in files for pair in re.findall(r'python -c "from ([\w.]+) import (\w+)', file.read_text())}
    assert ("torchtune_kd.tools", "fetch_smollm2") in found
    assert [pair for pair in sorted(found) if not hasattr(importlib.import_module(pair[0]), pair[1])] == []


def test_commands_name_what_is_there():
    """Modules of ``python -m``, tests, configs, components."""
    text = "\n".join(file.read_text() for file in TEXTS)
    modules = set(re.findall(r"python -m ((?:torchtune_kd|benchmarks)[\w.]*)", text))
    assert {"torchtune_kd.tools.prune", "torchtune_kd.tools.gguf", "torchtune_kd.demo"} <= modules
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for path in re.findall(r"pytest (tests/[\w/]+)", text):
        assert (ROOT / path).exists(), path
    configs = set(re.findall(r"--config torchtune_kd/(\S+)|tune cp torchtune_kd/([\w.]+/\S+_KD_\S+)", text))
    for config in {one or other for one, other in configs}:
        assert (ROOT / "configs" / f"{config.rstrip('`')}.yaml").is_file(), config
    components = set(re.findall(r"\btorchtune_kd(?:\.\w+)+", text))
    for name in components:
        assert importable(name), name


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_where_the_text_has_them(file):
    """Paths in inline code, from the root of the repository or of the package, or from the page itself."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = text.partition("## Room for what is planned")[0]
    for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md|sh|slurm|txt|yaml|yml))`", text):
        places = (ROOT, ROOT / "torchtune_kd", ROOT / "kernels", file.parent)
        assert any((place / path).is_file() for place in places), path


def test_targets_of_make_are_there():
    targets = {word for command in COMMANDS for word in re.findall(r"^make ([\w-]+)$", command)}
    assert {"demo", "install", "check", "test", "test-nightly"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_overrides_are_keys_of_configs():
    """``key=value`` behind ``tune run`` or the demo: a setting, a section, a key of the plan, or a name of a config."""
    known = {*settings.KEYS, *(field.name for field in fields(Request)), *evaluation.request.OWN, *inspection.OWN}
    known |= {"baseline", "metrics", "title"}  # of torchtune_kd/compare
    known |= {"cache"}  # of torchtune_kd/cache_teacher
    for file in (ROOT / "configs").rglob("*.yaml"):
        known |= set(re.findall(r"^(\w+):", file.read_text(), flags=re.MULTILINE))
    overrides = {
        key
        for command in COMMANDS
        if re.match(r"tune run|python -m torchtune_kd.demo", command)
        for key in re.findall(r" (\w+)(?:\.\w+)*=", command)
    }
    assert {"devices", "max_minutes", "data_dir", "optimizer"} <= overrides
    assert overrides <= known


@pytest.mark.slow
def test_options_of_commands_are_there():
    options = {}
    for command in COMMANDS:
        if match := re.match(r"python -m ((?:torchtune_kd|benchmarks)[\w.]*)", command):
            options.setdefault(match[1], set()).update(re.findall(r" (--[\w-]+)", command))
    assert {"--num-layers", "--strategy"} <= options["torchtune_kd.tools.prune"]
    for module, names in options.items():
        if names:
            shown = subprocess.run(
                [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
            )
            assert shown.returncode == 0, shown.stderr
            assert names <= set(re.findall(r"--[\w-]+", shown.stdout)), module


def importable(name):
    """Return whether the dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return all((value := getattr(value, attribute, None)) is not None for attribute in parts[length:])
    return False


def test_architecture_is_the_code():
    """The rooms with what they may import are those of FLOORS, and the step is the recipe's."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    step = re.search(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)[1]
    assert step in (ROOT / "recipes" / "kd.py").read_text()
    spec = importlib.util.spec_from_file_location("package_tests", ROOT / "tests" / "test_package.py")
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    table = page.partition("| room | holds | may import |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| .+? \| (.+?) \|$", table, flags=re.MULTILINE)
    rooms = {name: below for names, below in rows for name in re.findall(r"\w+", names)}
    assert set(rooms) == {name for name in package.FLOORS if not name.startswith("_")}
    for name, below in rooms.items():
        if re.fullmatch(r"[\w, ]+", below) and not below.startswith(("nothing", "all", "as ", "training, plan")):
            assert set(below.split(", ")) == package.FLOORS[name], name


@pytest.mark.slow
def test_the_pages_build(tmp_path):
    """Every link and name is found without importing torch; no other markup is left in the reference."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    program = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"
    command = [sys.executable, "-c", program, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = (tmp_path / "site" / "api" / "kernels" / "index.html").read_text()
    assert "softmax_kd_loss" in kernels and "linear_kd_loss" in kernels
    for page in (tmp_path / "site" / "api").rglob("index.html"):
        text = page.read_text()
        assert not re.search(r":(func|class|meth|mod|data|math):|\.\. math::|====", text), page
        assert text.count("doc-heading") > 1, page
