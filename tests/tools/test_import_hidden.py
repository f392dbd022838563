"""vLLM's hidden states, from before the final norm: they train as our own cache of states does."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune import config as torchtune_config

from helpers.cached import cached, write
from helpers.foreign import imported, run_config
from helpers.resumable import CLOCK
from helpers.tiny import read_log, run_in_process
from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.errors import UserError
from torchtune_kd.tools.importing.vllm_hidden import read_vllm_hidden

WIDTH = 256


def run(folder, out=""):
    cfg = run_config(folder, out)
    cfg.kd_loss.temperature = 2.0
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Our own cache in fp32, and a file for each row: the states behind both layers of the tiny teacher."""
    folder = tmp_path_factory.mktemp("hidden")
    cfg = run(folder)
    write(cfg, folder / "own")
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    teacher = torchtune_config.instantiate(plain.teacher_model)
    teacher.load_state_dict(torchtune_config.instantiate(plain.teacher_checkpointer).load_checkpoint()["model"])
    behind = []
    for layer in teacher.layers:
        layer.register_forward_hook(lambda _, given, out: behind.append(out[0]))
    rows = torchtune_config.instantiate(plain.dataset, torchtune_config.instantiate(plain.tokenizer))
    (folder / "states").mkdir()
    for at, row in enumerate(rows):
        behind.clear()
        tokens = torch.tensor(row["tokens"])
        with torch.no_grad():
            teacher(tokens.unsqueeze(0))
        tensors = {"hidden_states": torch.stack(behind, 1).contiguous(), "token_ids": tokens}
        save_file(tensors, folder / "states" / f"request-{at}.safetensors")
    return folder


@pytest.mark.heavy
def test_they_train_as_our_own_do(folder, tmp_path, capsys):
    cfg = run(folder)
    cache = imported(cfg, "vllm_hidden", folder / "states", tmp_path / "cache", "--dtype", "fp32")
    said = capsys.readouterr().out
    assert "hidden states in fp32" in said and "24 of the 24 rows of `dataset`" in said and "nats" in said
    manifest, own = (CacheManifest.read(each) for each in (cache, folder / "own"))
    assert (manifest.width, manifest.vocab, manifest.tokens) == (own.width, own.vocab, own.tokens)
    assert manifest.teacher["imported from"] == "vllm_hidden" and manifest.computed_in == "fp32"
    logs = []
    for name, read in (("own", folder / "own"), ("imported", cache)):
        again = cached(cfg, read, output_dir=str(tmp_path / name))
        run_in_process(again)
        logs.append(read_log(again.output_dir))
    for ours, theirs in zip(*logs, strict=True):
        assert theirs.keys() == ours.keys()
        for name in theirs.keys() - CLOCK:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-4), name


def test_another_layer_predicts_less(folder, tmp_path, capsys):
    said = []
    for layer in ("-1", "0"):
        imported(run(folder), "vllm_hidden", folder / "states", tmp_path / layer, "--layer", layer)
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    assert CacheManifest.read(tmp_path / "0").dtype == "bf16"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda tensors: tensors.pop("token_ids"), "`hidden_states` and `token_ids`, but .* has hidden_states"),
        (lambda tensors: tensors.update(token_ids=tensors["token_ids"][1:]), r"has \[\d+, 2, 256\] of \[\d+\]"),
        (lambda tensors: tensors.update(hidden_states=tensors["hidden_states"][..., 1:].contiguous()), "width 256"),
        (lambda tensors: tensors.update(hidden_states=tensors["hidden_states"][:, :0].contiguous()), "the 0 layers"),
    ],
)
def test_files_that_do_not_fit(folder, tmp_path, change, sentence):
    tensors = load_file(folder / "states" / "request-5.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=sentence):
        list(read_vllm_hidden(tmp_path, WIDTH))
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_vllm_hidden(tmp_path, WIDTH))


def test_states_that_are_not_finite(folder, tmp_path, capsys):
    tensors = load_file(folder / "states" / "request-5.safetensors")
    tensors["hidden_states"][1] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit):
        imported(run(folder), "vllm_hidden", tmp_path / "a.safetensors", tmp_path / "cache", "--partial")
    assert "Expected finite states" in capsys.readouterr().err


def test_the_teacher_is_needed(folder, tmp_path, capsys):
    cfg = run(folder)
    cfg.teacher_model = cfg.teacher_checkpointer = None
    with pytest.raises(SystemExit):
        imported(cfg, "vllm_hidden", folder / "states", tmp_path / "cache")
    assert "whose final norm and head the states need" in capsys.readouterr().err
