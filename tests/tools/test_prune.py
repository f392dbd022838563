"""The command that prunes: what it writes, and its sentences for mistakes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune import config

from helpers.pruning import LAYERS, SECTION, load, shard, small_model, write_teacher
from helpers.tiny import VOCAB
from torchtune_kd.models.smollm2 import smollm2_tokenizer
from torchtune_kd.tools import layer_influence, prune, removal_influence, select_layers, text_batches
from torchtune_kd.tools.prune import main


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_teacher(tmp_path)


def test_command_line(teacher: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pruning_builders", SimpleNamespace(tiny_model=small_model))
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 40)
    common = ["--checkpoint-dir", str(teacher), "--num-layers", "2"]
    main([*common, "--output-dir", str(tmp_path / "even"), "--strategy", "even"])
    assert capsys.readouterr().out.endswith("kept 2 of 6 layers: 0 5\n")

    measured = ["--model", "pruning_builders.tiny_model", "--text", str(text)]
    measured += ["--tokenizer", "torchtune_kd.models.smollm2.smollm2_tokenizer"]
    model = load(teacher, LAYERS, tmp_path)
    batches = text_batches(smollm2_tokenizer(teacher), text.read_text(), seq_len=64)
    for strategy, measure in (("influence", layer_influence), ("removal", removal_influence)):
        output = tmp_path / strategy
        main([*common, "--output-dir", str(output), "--strategy", strategy, *measured])
        expected = select_layers(LAYERS, 2, strategy, measure(model, batches))
        assert json.loads((output / "config.json").read_text())["pruned_from"]["layers"] == expected

    with monkeypatch.context() as patch:
        patch.setattr(prune, "_measure", lambda _: pytest.fail("measured although it is in vain"))
        options = [*common, "--strategy", "removal", *measured]
        sentence = _refused([*options, "--output-dir", str(tmp_path / "even")], capsys)
        assert f"{tmp_path / 'even'} already holds files; choose another one or pass --overwrite." in sentence
        sentence = _refused([*options, "--output-dir", str(tmp_path / "x"), "--num-layers", "7"], capsys)
        assert "keep 1 to 6 layers, but got 7" in sentence
    assert str(text) in _refused([*common, "--output-dir", str(text / "below a file"), "--strategy", "even"], capsys)
    with pytest.raises(SystemExit) as stop:
        main([*common, "--output-dir", str(tmp_path / "x"), "--strategy", "removal"])
    assert stop.value.code == 2
    assert "needs --model, --tokenizer, --text" in capsys.readouterr().err


def _refused(argv: list[str], capsys) -> str:
    """The one sentence with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.endswith(".\n") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model", "no.such"], ["--model", "'no.such' cannot be imported", "No module named 'no'"]),
        (["--model", "nope"], ["--model", "'nope' cannot be imported", "No module named 'nope'"]),
        (["--model", "torchtune.models.nope"], ["'torchtune.models.nope' cannot be imported"]),
        (["--model", "torchtune.models.llama3_2.llama3_2"], ["--model", "no arguments", "'vocab_size'"]),
        (["--model", "torchtune.models"], ["--model", "not callable"]),
        (["--model", "builtins.dict"], ["--model builtins.dict", "TransformerDecoder, but it makes a dict"]),
        (
            ["--model", "pruning_builders.wider"],
            ["pruning_builders.wider", "56 weights differ", f"tok_embeddings.weight ([{VOCAB}, 128] in the model"],
        ),
        (["--model", "pruning_builders.deeper"], ["9 weights differ, first layers.6.", "none in the checkpoint"]),
        (["--model-type", "FOO"], ["--model-type", "LLAMA3_2", "got 'FOO'"]),
        (["--model-type", "PHI3_MINI"], ["--model-type PHI3_MINI in teacher"]),
        (["--tokenizer", "nope"], ["--tokenizer", "'nope' cannot be imported"]),
        (["--tokenizer", "builtins.str"], ["--tokenizer builtins.str", "makes a str"]),
        (["--tokenizer-path", "nowhere.json"], ["nowhere.json does not exist", "--tokenizer-path"]),
        (["--text", "latin1.txt"], ["--text", "latin1.txt", "UTF-8"]),
        (["--text", "nowhere.txt"], ["--text", "nowhere.txt"]),
        (["--text", "short.txt"], ["at least 64 tokens, but got 5"]),
    ],
)
def test_command_line_mistakes(teacher: Path, tmp_path: Path, monkeypatch, capsys, options, parts) -> None:
    wider = SECTION | {"embed_dim": 128}
    builders = SimpleNamespace(
        tiny_model=small_model,
        wider=lambda: config.instantiate(OmegaConf.create(wider)),
        deeper=lambda: small_model(LAYERS + 1),
    )
    monkeypatch.setitem(sys.modules, "pruning_builders", builders)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one two three " * 40)
    Path("short.txt").write_text("short")
    Path("latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 40)
    argv = ["--checkpoint-dir", "teacher", "--output-dir", "out", "--num-layers", "2", "--strategy", "influence"]
    argv += ["--model", "pruning_builders.tiny_model", "--text", "text.txt"]
    argv += ["--tokenizer", "torchtune_kd.models.smollm2.smollm2_tokenizer"]
    before = set(tmp_path.iterdir())
    sentence = _refused([*argv, *options], capsys)
    assert [part for part in parts if part not in sentence] == [], sentence
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{ no JSON"),
        ("config.json", b'{"num_hidden_layers": "\xff"}'),
        ("config.json", b"7"),
        ("config.json", b'{"num_hidden_layers": null}'),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0 no header"),
    ],
)
def test_command_line_names_the_broken_file(teacher: Path, tmp_path: Path, capsys, name: str, content: bytes) -> None:
    (teacher / name).write_bytes(content)
    argv = ["--checkpoint-dir", str(teacher), "--output-dir", str(tmp_path / "out"), "--num-layers", "2"]
    sentence = _refused([*argv, "--strategy", "even"], capsys)
    assert f" {teacher / name}, but" in sentence and "fetch the checkpoint again" in sentence
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


def test_command_line_measures_the_files_of_the_index(teacher: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pruning_builders", SimpleNamespace(tiny_model=small_model))
    (tmp_path / "text.txt").write_text("one two three " * 40)
    options = ["--checkpoint-dir", str(teacher), "--num-layers", "2", "--strategy", "removal"]
    options += ["--model", "pruning_builders.tiny_model", "--text", str(tmp_path / "text.txt")]
    options += ["--tokenizer", "torchtune_kd.models.smollm2.smollm2_tokenizer"]
    main([*options, "--output-dir", str(tmp_path / "whole")])
    expected = capsys.readouterr().out.replace("whole", "sharded")
    shard(teacher, 2)
    # the index leaves this one out; in a plain listing it comes last and overrides
    save_file({"model.norm.weight": torch.full((64,), float("nan"))}, teacher / "stray.safetensors")
    main([*options, "--output-dir", str(tmp_path / "sharded")])
    assert capsys.readouterr().out == expected
