"""A torchtune or torchao that cannot work is one sentence, not a traceback from inside torchtune."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from torchtune_kd import _versions


def fake(monkeypatch, **installed):
    def version(package):
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(_versions, "version", version)


@pytest.mark.parametrize("torchtune", ["0.6.1", "0.6.1+cpu"])
@pytest.mark.parametrize("torchao", ["0.10.0", "0.11", "0.15.0", "0.15.0+cu128", "0.15.1.post1"])
def test_versions_that_work(monkeypatch, torchtune, torchao):
    fake(monkeypatch, torchtune=torchtune, torchao=torchao)
    _versions.check_versions()


# 0.9 passes where versions are compared as text; 0.16.0.dev already lacks what torchtune needs; 1.0 is above
# by its first number alone
@pytest.mark.parametrize("torchao", ["0.9.0", "0.16.0", "0.16.0.dev20250901", "0.18.0", "1.0", "unknown"])
def test_torchao_outside_the_window(monkeypatch, torchao):
    fake(monkeypatch, torchtune="0.6.1", torchao=torchao)
    with pytest.raises(ImportError) as caught:
        _versions.check_versions()
    assert str(caught.value) == (
        f"torchtune 0.6.1 needs torchao>=0.10,<0.16, but torchao {torchao} is installed: "
        'run pip install "torchao>=0.10,<0.16".'
    )


@pytest.mark.parametrize("torchtune", ["0.5.0", "0.6.0", "0.6.10", "0.7.0.dev0"])
def test_other_torchtune(monkeypatch, torchtune):
    fake(monkeypatch, torchtune=torchtune, torchao="0.15.0")
    with pytest.raises(ImportError) as caught:
        _versions.check_versions()
    assert str(caught.value) == (
        f"torchtune-kd needs torchtune==0.6.1, but torchtune {torchtune} is installed: "
        'run pip install "torchtune==0.6.1".'
    )


@pytest.mark.parametrize("missing", ["torchtune", "torchao"])
def test_missing_package(monkeypatch, missing):
    installed = {"torchtune": "0.6.1", "torchao": "0.15.0"}
    del installed[missing]
    fake(monkeypatch, **installed)
    with pytest.raises(ImportError, match=f"but {missing} is not installed: run pip install"):
        _versions.check_versions()


@pytest.mark.parametrize("package", ["torchtune_kd.training", "torchtune_kd.models"])
def test_packages_that_need_torchtune_say_it_first(tmp_path, package):
    """A real import under a torchao that is too new: the sentence comes before torchtune's own failure."""
    metadata = tmp_path / "site" / "torchao-0.18.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.18.0\n")
    environment = {**os.environ, "PYTHONPATH": str(metadata.parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", f"import {package}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: torchtune 0.6.1 needs torchao>=0.10,<0.16, but torchao 0.18.0 is installed: "
        'run pip install "torchao>=0.10,<0.16".'
    )
