"""A small teacher whose layers are pruned, in one file or in shards, and its model."""

import json
from pathlib import Path

from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune import config
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from helpers.tiny import TEACHER, model_section, write_checkpoint

LAYERS = 6
SECTION = model_section("full", TEACHER | {"num_layers": LAYERS, "embed_dim": 64, "intermediate_dim": 96})


def section(num_layers: int) -> dict:
    return SECTION | {"num_layers": num_layers}


def small_model(num_layers: int = LAYERS) -> TransformerDecoder:
    return config.instantiate(OmegaConf.create(section(num_layers)))


def load(folder: Path, num_layers: int, tmp_path: Path) -> TransformerDecoder:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    checkpointer = FullModelHFCheckpointer(str(folder), files, "LLAMA3_2", str(tmp_path / "unused"))
    model = small_model(num_layers)
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model


def shard(folder: Path, num_shards: int) -> None:
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


def write_teacher(folder: Path) -> Path:
    """Write the checkpoint that is pruned, and return its folder."""
    return write_checkpoint(folder / "teacher", SECTION, seed=1)
