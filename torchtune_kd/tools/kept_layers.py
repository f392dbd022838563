"""Write a Hugging Face checkpoint that holds only some layers of another one."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from torchtune_kd.storage.atomic import check_output_dir, complete_folder

_LAYER_KEY = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_INDEX_FILE = "model.safetensors.index.json"
_TOKENIZER_FILES = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template|generation_config|LICENSE)[^/]*"
)


def prune_checkpoint(
    checkpoint_dir: str | Path, output_dir: str | Path, layers: Sequence[int], *, overwrite: bool = False
) -> Path:
    """Write a Hugging Face checkpoint that holds only some layers of another one.

    Kept layers are renumbered from 0; embedding, final norm and output head stay. ``config.json`` gets the new
    ``num_hidden_layers`` and a record ``pruned_from`` of the kept layers. Tokenizer files are copied. Shards are
    read and written one at a time. The folder appears in one step once it is complete.

    Args:
        checkpoint_dir (str | Path): Hugging Face folder with ``config.json`` and safetensors, one file or shards.
        output_dir (str | Path): Folder to write.
        layers (Sequence[int]): Layers to keep, counted from 0, in ascending order.
        overwrite (bool): Replace ``output_dir`` if it holds a checkpoint. Default False.

    Returns:
        Path: ``output_dir``.

    Raises:
        ValueError: If a file is missing, ``layers`` does not fit the checkpoint, or ``output_dir`` holds a checkpoint
            and ``overwrite`` is False, or holds ``checkpoint_dir``, the current folder or anything else.
    """
    source, output_dir, layers = Path(checkpoint_dir), Path(output_dir), list(layers)
    config = read_config(source)
    num_layers = config["num_hidden_layers"]
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
        raise ValueError(
            f"Expected ascending layers between 0 and {num_layers - 1}, each once, but got {layers}; correct the list."
        )
    check_output_dir(output_dir, source, overwrite=overwrite)
    shards = _kept_tensors(source, layers, num_layers)

    config["num_hidden_layers"] = len(layers)
    if "layer_types" in config:  # a per-layer list in the configurations of newer families
        config["layer_types"] = [config["layer_types"][layer] for layer in layers]
    earlier = {"pruned_from": config["pruned_from"]} if "pruned_from" in config else {}
    config["pruned_from"] = {"num_hidden_layers": num_layers, "layers": layers, **earlier}
    with complete_folder(output_dir, source, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_shards(shards, folder)
        _copy_tokenizer(source, folder)
    return output_dir


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a Hugging Face folder, or raise a ValueError if it describes no text decoder."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"Expected a Hugging Face checkpoint folder, but {file} does not exist; check the path.")
    config = json.loads(file.read_text())
    if "num_hidden_layers" not in config:
        raise ValueError(
            f"Expected 'num_hidden_layers' in {file}, but it is not there; only text decoders can be pruned."
        )
    return config


def safetensors_files(folder: Path) -> list[Path]:
    """Return the files of a Hugging Face folder that hold its weights, or raise a ValueError if one is missing."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / _INDEX_FILE).is_file():  # it says which files belong to the model
        names = set(json.loads((folder / _INDEX_FILE).read_text())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"Expected {missing[0] if missing else 'safetensors files'} in {folder}, but there is none; "
            "fetch the checkpoint again or convert it to safetensors."
        )
    return files


def _kept_tensors(folder: Path, layers: list[int], num_layers: int) -> dict[Path, dict[str, str]]:
    """Return for each safetensors file the kept tensors: old name to new name."""
    new_index = {str(old): str(new) for new, old in enumerate(layers)}
    shards, found = {}, set()
    for file in safetensors_files(folder):
        with safe_open(file, framework="pt") as tensors:
            kept = {}
            for key in tensors.keys():  # noqa: SIM118, a safetensors handle is no mapping
                match = _LAYER_KEY.fullmatch(key)
                if match is None:
                    kept[key] = key
                    continue
                found.add(int(match[2]))
                if match[2] in new_index:
                    kept[key] = f"{match[1]}{new_index[match[2]]}{match[3]}"
        if kept:
            shards[file] = kept
    if found != set(range(num_layers)):
        raise ValueError(
            f"Expected weights of the layers 0 to {num_layers - 1} that {folder / 'config.json'} announces, but found "
            f"{len(found)} layers under 'model.layers.'; fetch the checkpoint again."
        )
    return shards


def _write_shards(shards: dict[Path, dict[str, str]], folder: Path) -> None:
    weight_map, total_size = {}, 0
    for number, (file, names) in enumerate(shards.items(), start=1):
        single = len(shards) == 1
        target = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with safe_open(file, framework="pt") as tensors:
            weights = {new: tensors.get_tensor(old) for old, new in names.items()}
        save_file(weights, folder / target, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(weights, target))
        total_size += sum(weight.nbytes for weight in weights.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for part in ("", "original"):  # Llama checkpoints keep Meta's tokenizer.model in original/
        for file in sorted((source / part).glob("*")):
            if file.is_file() and _TOKENIZER_FILES.fullmatch(file.name):
                (folder / part).mkdir(exist_ok=True)
                shutil.copyfile(file, folder / part / file.name)
