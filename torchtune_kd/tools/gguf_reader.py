"""Turn a GGUF file of a Llama-architecture model into a Hugging Face checkpoint folder."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf

from torchtune_kd.storage.atomic import check_output_dir, complete_folder
from torchtune_kd.storage.fingerprints import file_sha256

# GGUF keeps the layout of Meta's checkpoints, which is torchtune's too: rotary pairs side by side.
_TUNE_NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.scale",
    "output.weight": "output.weight",
    "blk.{}.attn_norm.weight": "layers.{}.sa_norm.scale",
    "blk.{}.attn_q.weight": "layers.{}.attn.q_proj.weight",
    "blk.{}.attn_k.weight": "layers.{}.attn.k_proj.weight",
    "blk.{}.attn_v.weight": "layers.{}.attn.v_proj.weight",
    "blk.{}.attn_output.weight": "layers.{}.attn.output_proj.weight",
    "blk.{}.ffn_norm.weight": "layers.{}.mlp_norm.scale",
    "blk.{}.ffn_gate.weight": "layers.{}.mlp.w1.weight",
    "blk.{}.ffn_down.weight": "layers.{}.mlp.w2.weight",
    "blk.{}.ffn_up.weight": "layers.{}.mlp.w3.weight",
}
# Names of `tokenizer.ggml.pre` whose splitting the `tokenizers` package reproduces with its own parts,
# and whether single digits are split off before the byte-level step. "default" stands for a splitting that the
# converter did not know.
_SPLITS_DIGITS = {"gpt-2": False, "smollm": True, "starcoder": True}
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`
_ORIGIN = "converted_from"  # key of config.json that records the source


def gguf_to_hf(
    gguf_path: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the model and tokenizer of a GGUF file as a Hugging Face checkpoint folder.

    Weights are dequantised, so the result computes what the GGUF file computes up to rounding to ``dtype``;
    precision that quantisation took away does not come back. Query and key rows are reordered from GGUF's
    interleaved rotary pairs to Hugging Face's split halves. The folder appears in one step once it is
    complete; a folder that already holds this conversion of this file is returned as it is.

    Files: ``config.json``, ``generation_config.json``, ``model.safetensors``, ``tokenizer.json``,
    ``tokenizer_config.json``, ``special_tokens_map.json``.

    Args:
        gguf_path (str | Path): Complete GGUF file of architecture "llama" without RoPE scaling, with a byte-level
            BPE tokenizer ("gpt2") inside.
        output_dir (str | Path): Folder to write.
        dtype (torch.dtype): dtype of the written weights. Default ``torch.bfloat16``.
        overwrite (bool): Replace ``output_dir`` if it holds another checkpoint. Default False.

    Returns:
        Path: ``output_dir``.

    Raises:
        ValueError: If the file is missing, no GGUF file, or of a kind that is not supported, or if
            ``output_dir`` holds another checkpoint and ``overwrite`` is False, or holds ``gguf_path``, the current
            folder or anything else.
        ImportError: If the package ``gguf`` is not installed.
    """
    gguf = import_gguf()
    gguf_path, output_dir = Path(gguf_path), Path(output_dir)
    if not gguf_path.is_file():
        raise ValueError(f"Expected a GGUF file, but {gguf_path} does not exist; check the path.")
    origin = {"file": gguf_path.name, "sha256": file_sha256(gguf_path), "dtype": _dtype_name(dtype)}
    if _read_origin(output_dir) == origin:
        return output_dir
    check_output_dir(output_dir, gguf_path, overwrite=overwrite)

    try:
        reader = gguf.GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{gguf_path} is not a readable GGUF file ({error}); fetch it again.") from error
    fields = {name: _field_value(gguf, field) for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_kind(gguf_path, fields, tensors)
    names = _tune_names(gguf_path, fields, tensors)
    config = _model_config(gguf_path, fields, tensors, dtype)
    tokenizer = _build_tokenizer(gguf_path, fields)
    weights = _read_weights(gguf, tensors, names, config, dtype)

    special = _special_tokens(fields)
    token_ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.items() if name != "unk_token"}
    with complete_folder(output_dir, gguf_path, overwrite=overwrite) as folder:
        _write_json(folder / "config.json", {**config, **token_ids, _ORIGIN: origin})
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **token_ids})
        _write_json(folder / "special_tokens_map.json", special)
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields, config, special))
        tokenizer.save(str(folder / "tokenizer.json"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return output_dir


def import_gguf() -> ModuleType:
    """Return the package ``gguf``, or raise an ImportError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "Reading a GGUF file needs the package gguf, which is not installed; "
            "install it with `pip install 'torchtune-kd[demo]'`."
        ) from error
    return gguf


def _field_value(gguf: ModuleType, field: Any) -> Any:
    """Return the Python value of a ``gguf.ReaderField``."""
    kind = field.types[-1] if field.types else None
    values = [field.parts[index] for index in field.data]
    if kind == gguf.GGUFValueType.STRING:
        values = [bytes(value).decode("utf-8") for value in values]
    else:
        values = [value[0].item() for value in values]
    is_array = bool(field.types) and field.types[0] == gguf.GGUFValueType.ARRAY
    return values if is_array else values[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_origin(folder: Path) -> dict[str, str] | None:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:  # no JSON: not written here
        return None
    return config.get(_ORIGIN) if isinstance(config, dict) and "pruned_from" not in config else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require(path: Path, fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"{path} lacks the metadata field {name!r}, which a Llama model needs; fetch another file.")
    return fields[name]


def _check_kind(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"Expected a GGUF file of architecture 'llama', but {path} holds {architecture!r}; "
            "only Llama-architecture models can be converted."
        )
    num_parts = fields.get("split.count", 1)
    if num_parts > 1:
        raise ValueError(
            f"Expected a GGUF file in one piece, but {path} is one of {num_parts} parts; "
            "merge them with `llama-gguf-split --merge`."
        )
    if fields.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(
            f"Expected plain rotary embeddings, but {path} scales them; "
            "convert a model without RoPE scaling, or use the publisher's own Hugging Face folder."
        )


def _tune_names(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, str]:
    """Return torchtune's name of each tensor, after a check that they are those of the whole model."""
    layers = range(_require(path, fields, "llama.block_count"))
    names = {}
    for name, tune_name in _TUNE_NAMES.items():
        indices = layers if "{}" in name else ("",)
        names |= {name.format(index): tune_name.format(index) for index in indices}
    if "output.weight" not in tensors:  # tied to the embedding
        del names["output.weight"]
    unknown = [name for name in tensors if name not in names]
    if unknown:
        raise ValueError(
            f"{path} holds the tensor {unknown[0]!r}, which is no part of a dense Llama model of {len(layers)} layers; "
            "mixtures of experts and models with biases cannot be converted."
        )
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            f"Expected {len(names)} tensors for the {len(layers)} layers that {path} announces, but {len(missing)} are "
            f"missing, first {missing[0]!r}; fetch the whole file again."
        )
    return names


def _model_config(path: Path, fields: dict[str, Any], tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    width = _require(path, fields, "llama.embedding_length")
    heads = _require(path, fields, "llama.attention.head_count")
    head_dim = fields.get("llama.attention.key_length", width // heads)
    num_tokens = len(_require(path, fields, "tokenizer.ggml.tokens"))
    vocab_size = tensors["token_embd.weight"].shape[-1].item()  # more rows than tokens is padding
    if vocab_size < num_tokens:
        raise ValueError(
            f"Expected an embedding row for each of the {num_tokens} tokens in {path}, but got {vocab_size}; "
            "fetch another file."
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": _require(path, fields, "llama.feed_forward_length"),
        "num_hidden_layers": _require(path, fields, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": _require(path, fields, "llama.context_length"),
        # metadata floats are fp32: 1e-5 arrives as 9.99999975e-06
        "rms_norm_eps": float(f"{_require(path, fields, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _dtype_name(dtype),
    }


def _read_weights(
    gguf: ModuleType, tensors: dict[str, Any], names: dict[str, str], config: dict[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    tune_weights = {}
    for name, tensor in tensors.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tune_weights[names[name]] = torch.from_numpy(values.copy()).to(dtype)
    return tune_to_hf(
        tune_weights,
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        dim=config["hidden_size"],
        head_dim=config["head_dim"],
    )


def _build_tokenizer(path: Path, fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = _require(path, fields, "tokenizer.ggml.model")
    split = fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS_DIGITS:
        raise ValueError(
            f"Expected a byte-level BPE tokenizer ('gpt2', split as one of {', '.join(_SPLITS_DIGITS)}), but "
            f"{path} holds {kind!r}, split as {split!r}; use the publisher's own Hugging Face folder."
        )
    tokens = _require(path, fields, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _require(path, fields, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if _SPLITS_DIGITS[split]:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, _require(path, fields, "tokenizer.ggml.token_type"), strict=True):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _special_tokens(fields: dict[str, Any]) -> dict[str, str]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {ours: fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _tokenizer_config(fields: dict[str, Any], config: dict[str, Any], special: dict[str, str]) -> dict[str, Any]:
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False),
        **special,
    }
    if "tokenizer.chat_template" in fields:
        content["chat_template"] = fields["tokenizer.chat_template"]
    return content
