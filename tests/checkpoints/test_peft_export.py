"""What an export holds besides merged weights; that transformers and peft read it rightly is tests/exports."""

import json

import pytest
import torch
from torchtune.models.convert_weights import tune_to_hf

from helpers.tiny import make_config, run_in_process
from torchtune_kd.checkpoints.peft_export import peft_weights


@pytest.fixture
def export(tmp_path):
    """Run one step of a config whose base may hold more than weights."""

    def made(kind, write=lambda base: None, **overrides):
        cfg = make_config(tmp_path, kind, max_steps_per_epoch=1, optimizer__lr=1e-2, **overrides)
        write(tmp_path / "student")
        run_in_process(cfg)
        return tmp_path / "out" / "epoch_0"

    return made


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


BASE = {"config.json", "tokenizer.json"}
ADAPTER = {f"adapter/adapter_{name}" for name in ("config.json", "model.safetensors", "model.pt")}


def test_merged_weights_and_the_adapter_lie_apart(export):
    folder = export("lora")
    weights = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert files(folder) == BASE | weights | ADAPTER
    own = torch.load(folder / "adapter" / "adapter_model.pt")  # for torchtune's recipes, by its names
    assert own["layers.0.attn.q_proj.lora_b.weight"].shape == (256, 4)


def test_an_adapter_alone_has_the_same_place(export):
    assert files(export("lora", save_adapter_weights_only=True)) == BASE | ADAPTER


def test_an_adapter_may_be_written_by_torch(export):
    folder = export("lora", checkpointer__safe_serialization=False) / "adapter"
    weights = torch.load(folder / "adapter_model.bin")
    assert weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (256, 4)
    assert not (folder / "adapter_model.safetensors").exists()


def test_the_adapter_of_the_base_model_does_not_come_along(export):
    """transformers would look for its weights, or for its base model."""

    def earlier_export(base):
        for folder in (base, base / "adapter"):
            folder.mkdir(exist_ok=True)
            (folder / "adapter_config.json").write_text("{}")

    assert not any("adapter" in name for name in files(export("full", earlier_export)))


@pytest.mark.parametrize("known", [True, False])
def test_the_adapter_names_its_base_model(export, tmp_path, known):
    def downloaded(base):
        if known:
            (base / "original_repo_id.json").write_text('{"repo_id": "org/base"}')

    folder = export("dora", downloaded)
    peft = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == ("org/base" if known else str(tmp_path / "student"))
    # a run that starts from these weights would name that repository as its base too
    assert not (folder / "original_repo_id.json").exists()
    assert peft["task_type"] == "CAUSAL_LM" and peft["use_dora"] is True
    assert (peft["r"], peft["lora_alpha"], peft["lora_dropout"]) == (4, 8, 0.0)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_config_json_is_that_of_the_weights(export, key):
    """The base may be in bf16, and may leave the tying to a default that differs between models."""

    def published(base):
        config = json.loads((base / "config.json").read_text())
        del config["tie_word_embeddings"]
        config |= {} if key is None else {key: "bfloat16"}
        (base / "config.json").write_text(json.dumps(config))

    config = json.loads((export("lora", published) / "config.json").read_text())
    assert config[key or "torch_dtype"] == "float32" and config["tie_word_embeddings"] is True
    assert ("dtype" in config) + ("torch_dtype" in config) == 1


def test_magnitudes_are_permuted_as_the_rows_they_scale():
    adapter = {
        f"layers.3.attn.{name}.magnitude": torch.randn(rows) for name, rows in (("q_proj", 256), ("k_proj", 128))
    }
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    rows = {name.replace("magnitude", "weight"): m.unsqueeze(1).expand(-1, 256) for name, m in adapter.items()}
    expected = tune_to_hf(rows, num_heads=4, num_kv_heads=2, dim=256)
    for permuted in (True, False):
        found = peft_weights(adapter, config, permuted=permuted)
        for name, value in adapter.items():
            key = name.replace("attn", "self_attn").removesuffix("magnitude")
            truth = expected[f"model.{key}weight"][:, 0] if permuted else value
            assert torch.equal(found[f"base_model.model.model.{key}lora_magnitude_vector"], truth)
