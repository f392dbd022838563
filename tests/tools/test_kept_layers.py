"""A pruned checkpoint is the teacher without the other layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.pruning import LAYERS, load, shard, write_teacher
from helpers.tiny import VOCAB
from torchtune_kd.tools import prune_checkpoint


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_teacher(tmp_path)


@pytest.mark.parametrize("num_shards", [1, 5])
def test_checkpoint_is_the_teacher_without_the_others(teacher: Path, tmp_path: Path, num_shards: int) -> None:
    if num_shards > 1:
        shard(teacher, num_shards)
    kept = [0, 3, 5]
    folder = prune_checkpoint(teacher, tmp_path / "student", kept)

    full, student = load(teacher, LAYERS, tmp_path), load(folder, len(kept), tmp_path)
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
    shard(teacher, 2)
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
