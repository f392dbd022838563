"""Layer-pruned students: which layers, and that the checkpoint is the teacher without the others."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune import config
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from helpers.tiny import TEACHER, VOCAB, model_section, write_checkpoint
from torchtune_kd.models.smollm2 import smollm2_tokenizer
from torchtune_kd.tools import layer_influence, prune, prune_checkpoint, removal_influence, select_layers, text_batches
from torchtune_kd.tools.prune import main

LAYERS = 6
SECTION = model_section("full", TEACHER | {"num_layers": LAYERS, "embed_dim": 64, "intermediate_dim": 96})
MEASURES = [layer_influence, removal_influence]


def _section(num_layers: int) -> dict:
    return SECTION | {"num_layers": num_layers}


def _model(num_layers: int = LAYERS) -> TransformerDecoder:
    return config.instantiate(OmegaConf.create(_section(num_layers)))


def _load(folder: Path, num_layers: int, tmp_path: Path) -> TransformerDecoder:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    checkpointer = FullModelHFCheckpointer(str(folder), files, "LLAMA3_2", str(tmp_path / "unused"))
    model = _model(num_layers)
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model


def _shard(folder: Path, num_shards: int) -> None:
    """Replace ``model.safetensors`` by shards that cut through layers."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for number in range(num_shards):
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _silence(layer: nn.Module) -> None:
    """Make a layer return its input."""
    nn.init.zeros_(layer.attn.output_proj.weight)
    nn.init.zeros_(layer.mlp.w2.weight)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "teacher", SECTION, seed=1)


@torch.no_grad()
def test_layer_influence_is_one_minus_the_cosine() -> None:
    model = _model()
    batches = [torch.randint(0, VOCAB, (2, 9)), torch.randint(0, VOCAB, (1, 5))]
    changes = []  # per batch [L, tokens]
    for tokens in batches:
        states = [model.tok_embeddings(tokens)]
        for layer in model.layers:
            states.append(layer(states[-1]))
        cosines = [F.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairwise(states)]
        changes.append(1 - torch.stack(cosines))
    expected = torch.cat(changes, dim=1).mean(dim=1)
    torch.testing.assert_close(layer_influence(model, batches), expected)


@torch.no_grad()
def test_removal_influence_compares_last_hidden_states() -> None:
    model = _model()
    tokens = torch.randint(0, VOCAB, (2, 9))

    def last(left_out: int | None) -> torch.Tensor:
        h = model.tok_embeddings(tokens)
        for index, layer in enumerate(model.layers):
            h = h if index == left_out else layer(h)
        return model.norm(h)

    expected = [1 - F.cosine_similarity(last(None), last(i), dim=-1).mean() for i in range(LAYERS)]
    torch.testing.assert_close(removal_influence(model, [tokens]), torch.stack(expected))


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_that_do_nothing_are_left_out(measure) -> None:
    model = _model()
    for index in (1, 4):
        _silence(model.layers[index])
    influence = measure(model, [torch.randint(0, VOCAB, (2, 16))])
    assert influence[[1, 4]].abs().max() < 1e-6
    strategy = {layer_influence: "influence", removal_influence: "removal"}[measure]
    assert select_layers(LAYERS, 4, strategy, influence) == [0, 2, 3, 5]


@pytest.mark.parametrize("measure", MEASURES)
def test_ignored_labels_do_not_count(measure) -> None:
    model = _model()
    tokens = torch.randint(0, VOCAB, (2, 8))
    labels = tokens.clone()
    labels[:, 5:] = -100
    # attention is causal: the first five tokens do not see the others
    torch.testing.assert_close(measure(model, [{"tokens": tokens, "labels": labels}]), measure(model, [tokens[:, :5]]))
    with pytest.raises(ValueError, match="no token that counts"):
        measure(model, [{"tokens": tokens, "labels": torch.full_like(labels, -100)}])
    with pytest.raises(ValueError, match="no token that counts"):
        measure(model, [])


@pytest.mark.parametrize("measure", MEASURES)
def test_packed_batches_keep_documents_apart(measure) -> None:
    model = _model()
    documents = torch.randint(0, VOCAB, (2, 4))
    packed = {
        "tokens": documents.view(1, 8),
        "mask": torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).tril().bool()[None],
        "input_pos": torch.arange(4).repeat(2)[None],
    }
    torch.testing.assert_close(measure(model, [packed]), measure(model, [documents]))


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_leaves_the_model_alone(measure) -> None:
    model = _model().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    measure(model, [torch.randint(0, VOCAB, (1, 4))])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("num_layers", "keep", "expected"),
    [(30, 30, list(range(30))), (30, 3, [0, 14, 29]), (6, 2, [0, 5]), (6, 1, [0]), (1, 1, [0])],
)
def test_even_layers(num_layers: int, keep: int, expected: list[int]) -> None:
    assert select_layers(num_layers, keep) == expected


def test_even_layers_are_distinct_and_spaced() -> None:
    for num_layers in range(1, 40):
        for keep in range(2, num_layers + 1):
            layers = select_layers(num_layers, keep, "even")
            gaps = {b - a for a, b in pairwise(layers)}
            assert len(layers) == keep
            assert (layers[0], layers[-1]) == (0, num_layers - 1)
            assert max(gaps) - min(gaps) <= 1
            assert min(gaps) >= 1


def test_largest_influence_is_kept() -> None:
    assert select_layers(5, 3, "influence", [0.5, 0.1, 0.3, 0.2, 0.9]) == [0, 2, 4]
    assert select_layers(5, 2, "removal", torch.tensor([0.5, 0.5, 0.5, 0.2, 0.1])) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 0), "keep 1 to 30 layers, but got 0"),
        ((30, 31), "keep 1 to 30 layers, but got 31"),
        ((30, 15, "odd"), "strategies even, influence, removal, but got 'odd'"),
        ((30, 15, "influence"), "30 influence values.*but got none; measure them with layer_influence"),
        ((3, 1, "removal", [0.1]), "3 influence values.*but got 1; measure them with removal_influence"),
        ((2, 1, "influence", [0.1, float("nan")]), "finite influence values"),
    ],
)
def test_bad_choices(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(*arguments)


@pytest.mark.parametrize("num_shards", [1, 5])
def test_checkpoint_is_the_teacher_without_the_others(teacher: Path, tmp_path: Path, num_shards: int) -> None:
    if num_shards > 1:
        _shard(teacher, num_shards)
    kept = [0, 3, 5]
    folder = prune_checkpoint(teacher, tmp_path / "student", kept)

    full, student = _load(teacher, LAYERS, tmp_path), _load(folder, len(kept), tmp_path)
    full.layers = nn.ModuleList(full.layers[layer] for layer in kept)
    tokens = torch.randint(0, VOCAB, (2, 12))
    assert torch.equal(student(tokens), full(tokens))

    before, after = (json.loads((path / "config.json").read_text()) for path in (teacher, folder))
    record = {"num_hidden_layers": 3, "pruned_from": {"num_hidden_layers": LAYERS, "layers": kept}}
    assert after == before | record
    assert (folder / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    index = folder / "model.safetensors.index.json"
    assert index.is_file() == (num_shards > 1)
    if num_shards > 1:
        index = json.loads(index.read_text())
        stored = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
        assert index["weight_map"] == stored
        files = sorted(set(stored.values()))
        assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in student.state_dict().values())


def test_pruning_twice_and_per_layer_settings(teacher: Path, tmp_path: Path) -> None:
    source = json.loads((teacher / "config.json").read_text())
    kinds = [f"kind{layer}" for layer in range(LAYERS)]
    (teacher / "config.json").write_text(json.dumps(source | {"layer_types": kinds}))
    (teacher / "original").mkdir()
    (teacher / "original" / "tokenizer.model").write_text("meta")
    first = prune_checkpoint(teacher, tmp_path / "first", [0, 2, 4, 5])
    second = prune_checkpoint(first, tmp_path / "second", [1, 3])
    written = json.loads((second / "config.json").read_text())
    assert written["layer_types"] == ["kind2", "kind5"]
    assert written["pruned_from"] == {
        "num_hidden_layers": 4,
        "layers": [1, 3],
        "pruned_from": {"num_hidden_layers": 6, "layers": [0, 2, 4, 5]},
    }
    assert (second / "original" / "tokenizer.model").read_text() == "meta"


def test_nothing_is_replaced_unasked(teacher: Path, tmp_path: Path) -> None:
    folder = prune_checkpoint(teacher, tmp_path / "student", [0])
    with pytest.raises(ValueError, match="already holds files"):
        prune_checkpoint(teacher, folder, [0, 1])
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    prune_checkpoint(teacher, folder, [0, 1], overwrite=True)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    for output in (teacher, tmp_path):
        with pytest.raises(ValueError, match="does not hold the source"):
            prune_checkpoint(teacher, output, [0], overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"teacher", "student"}


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1, 0], [0, LAYERS]])
def test_layers_that_do_not_fit(teacher: Path, tmp_path: Path, layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ascending layers between 0 and 5, each once, but got \["):
        prune_checkpoint(teacher, tmp_path / "student", layers)
    assert not (tmp_path / "student").exists()


def test_incomplete_checkpoints(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    with pytest.raises(ValueError, match=r"nowhere/config\.json does not exist"):
        prune_checkpoint(tmp_path / "nowhere", output, [0])
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 7}))
    with pytest.raises(ValueError, match=r"layers 0 to 6 that .*config\.json announces, but found 6"):
        prune_checkpoint(teacher, output, [0])
    _shard(teacher, 2)
    (teacher / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Expected model-00002-of-00002\.safetensors in"):
        prune_checkpoint(teacher, output, [0])
    (teacher / "model.safetensors.index.json").unlink()
    (teacher / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="Expected safetensors files in"):
        prune_checkpoint(teacher, output, [0])
    (teacher / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="only text decoders can be pruned"):
        prune_checkpoint(teacher, output, [0])


def test_text_batches(teacher: Path) -> None:
    tokenizer = smollm2_tokenizer(teacher)
    text = "".join(chr(97 + position // 8) for position in range(80))  # 10 rows of 8 equal letters
    batches = text_batches(tokenizer, text, seq_len=8, num_sequences=5)
    assert [tokenizer.decode(batch[0].tolist()) for batch in batches] == [letter * 8 for letter in "acegi"]
    assert len(text_batches(tokenizer, text, seq_len=8, num_sequences=99)) == 10
    with pytest.raises(ValueError, match="at least 81 tokens, but got 80"):
        text_batches(tokenizer, text, seq_len=81)


def test_command_line(teacher: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pruning_builders", SimpleNamespace(tiny_model=_model))
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 40)
    common = ["--checkpoint-dir", str(teacher), "--num-layers", "2"]
    main([*common, "--output-dir", str(tmp_path / "even"), "--strategy", "even"])
    assert capsys.readouterr().out.endswith("kept 2 of 6 layers: 0 5\n")

    measured = ["--model", "pruning_builders.tiny_model", "--text", str(text)]
    measured += ["--tokenizer", "torchtune_kd.models.smollm2.smollm2_tokenizer"]
    model = _load(teacher, LAYERS, tmp_path)
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
        tiny_model=_model,
        wider=lambda: config.instantiate(OmegaConf.create(wider)),
        deeper=lambda: _model(LAYERS + 1),
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
    monkeypatch.setitem(sys.modules, "pruning_builders", SimpleNamespace(tiny_model=_model))
    (tmp_path / "text.txt").write_text("one two three " * 40)
    options = ["--checkpoint-dir", str(teacher), "--num-layers", "2", "--strategy", "removal"]
    options += ["--model", "pruning_builders.tiny_model", "--text", str(tmp_path / "text.txt")]
    options += ["--tokenizer", "torchtune_kd.models.smollm2.smollm2_tokenizer"]
    main([*options, "--output-dir", str(tmp_path / "whole")])
    expected = capsys.readouterr().out.replace("whole", "sharded")
    _shard(teacher, 2)
    # the index leaves this one out; in a plain listing it comes last and overrides
    save_file({"model.norm.weight": torch.full((64,), float("nan"))}, teacher / "stray.safetensors")
    main([*options, "--output-dir", str(tmp_path / "sharded")])
    assert capsys.readouterr().out == expected
