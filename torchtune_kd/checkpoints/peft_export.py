"""Turn what torchtune's checkpointers write as ``epoch_<n>`` into what transformers and peft load rightly.

The merged weights stay in ``epoch_<n>`` and the adapter moves to ``epoch_<n>/adapter``: beside the weights,
transformers would find it and apply it a second time.

Shapes: R rank, D input width, O output width of an adapted layer.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune import training
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import ModelType

from torchtune_kd.config.sections import Section
from torchtune_kd.config.settings import Settings

ADAPTER_FOLDER = "adapter"
_ADAPTER_CONFIG = "adapter_config.json"
_BASE = "original_repo_id.json"  # torchtune's `tune download` writes it, its checkpointer names the base after it

# torchtune's names of the layers that its builders adapt, and those of Hugging Face's Llama and Qwen 2
_LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "output": "lm_head",
}
_PARTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def adapter_config(decoder: nn.Module, section: Section) -> dict[str, Any] | None:
    """Describe the adapters as PEFT's ``adapter_config.json`` does, read off the modules.

    Args:
        decoder (nn.Module): the student.
        section (Section): the config's ``checkpointer``; its folder is the base model, unless torchtune finds there
            which repository it was downloaded from.

    Returns:
        dict[str, Any] | None: with torchtune's names of modules, which its checkpointer translates; None for a
            full-weight student.
    """
    if not get_adapter_params(decoder):
        return None
    adapted = {n: m for n, m in decoder.named_modules() if isinstance(m, (LoRALinear, DoRALinear))}
    first = next(iter(adapted.values()))
    rank = first.lora_a.out_features
    alpha = round(first.scaling * rank, 6) if isinstance(first, DoRALinear) else first.alpha
    described = {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout.p if isinstance(first.dropout, nn.Dropout) else 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": isinstance(first, DoRALinear),
        "inference_mode": True,
    }
    if (folder := section.get("checkpoint_dir")) is not None:
        described["base_model_name_or_path"] = str(Path(str(folder)).absolute())
    return described


def finish_export(
    folder: Path,
    decoder: nn.Module,
    adapter: Mapping[str, Tensor] | None,
    checkpointer: Any,
    section: Section,
    settings: Settings,
) -> None:
    """Change what torchtune's checkpointer has written into ``folder``.

    Args:
        folder (Path): the epoch, not yet published.
        decoder (nn.Module): the student.
        adapter (Mapping[str, Tensor] | None): its adapters by torchtune's names; None for a full-weight student.
        checkpointer (Any): the one that wrote.
        section (Section): its section in the config.
        settings (Settings): the dtype of the weights, and whether there are any beside the adapters.
    """
    _separate_adapter(folder, has_adapter=adapter is not None)
    if not isinstance(checkpointer, training.FullModelHFCheckpointer):
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # torchtune writes this file for the models whose adapters it can translate
    if (folder / ADAPTER_FOLDER / _ADAPTER_CONFIG).exists():
        model_type = ModelType[section.get("model_type", ModelType.LLAMA3_2.name)]
        weights = peft_weights(adapter, config, permuted=model_type is not ModelType.QWEN2)
        if section.get("safe_serialization", True):
            save_file(weights, folder / ADAPTER_FOLDER / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            torch.save(weights, folder / ADAPTER_FOLDER / "adapter_model.bin")
    if not settings.save_adapter_weights_only:
        (folder / _BASE).unlink(missing_ok=True)  # these weights are no longer those of that repository
        if "hidden_size" in config:
            _describe_weights(folder / "config.json", config, decoder, settings.torch_dtype)


def peft_weights(adapter: Mapping[str, Tensor], config: Mapping[str, Any], *, permuted: bool) -> dict[str, Tensor]:
    """Translate adapters from torchtune's names and rotary order to PEFT's.

    Args:
        adapter (Mapping[str, Tensor]): ``lora_a`` [R, D], ``lora_b`` [O, R] and DoRA's ``magnitude`` [O].
        config (Mapping[str, Any]): the model's ``config.json``.
        permuted (bool): whether torchtune holds the rows of q and k in another order than Hugging Face, as for Llama
            but not for Qwen 2. Everything with O rows follows them, which torchtune forgets for the magnitude.
    """
    heads = {"attn.q_proj": config["num_attention_heads"], "attn.k_proj": config["num_key_value_heads"]}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    translated = {}
    for name, value in adapter.items():
        part = next(part for part in _PARTS if name.endswith(f".{part}"))
        module = name.removesuffix(f".{part}")
        layer = next(layer for layer in _LAYERS if module == layer or module.endswith(f".{layer}"))
        if permuted and layer in heads and part != "lora_a.weight":
            value = _pairs_to_halves(value, heads[layer], head_dim)
        inside = module.removesuffix(layer)  # "layers.<i>." or ""
        prefix = f"base_model.model.{'model.' if inside else ''}{inside}"
        translated[f"{prefix}{_LAYERS[layer]}.{_PARTS[part]}"] = value.contiguous()
    return translated


def _pairs_to_halves(rows: Tensor, heads: int, head_dim: int) -> Tensor:
    """Reorder the rows of each head from rotary pairs (0, 1), (2, 3), ... to two halves, as Hugging Face rotates."""
    return rows.view(heads, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _separate_adapter(folder: Path, *, has_adapter: bool) -> None:
    """Give the adapter a folder of its own, and drop the files of another one that came with the base model."""
    own = folder / ADAPTER_FOLDER
    shutil.rmtree(own, ignore_errors=True)
    files = [folder / _ADAPTER_CONFIG, *folder.glob("adapter_model.*")]
    if has_adapter:
        own.mkdir()
    for file in files:
        if has_adapter and file.exists():
            file.rename(own / file.name)
        else:
            file.unlink(missing_ok=True)


def _describe_weights(path: Path, config: dict[str, Any], decoder: nn.Module, dtype: torch.dtype) -> None:
    """Let ``config.json`` give the dtype and the tying of the weights that lie beside it, not those of the base."""
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = isinstance(decoder.output, TiedLinear)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
