"""Every export gives the student's logits in transformers and peft, which are all that most users load it with.

The runs are real, in fp32, from a base in bf16 whose ``config.json`` says so, as published ones are.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune import config
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

from helpers.exports_environment import exports_python
from helpers.tiny import VOCAB, make_config, run_in_process, write_tokenizer
from torchtune_kd.checkpoints.export import full_state_dict
from torchtune_kd.models.adapters import leave_biases_unscaled

KINDS = ["full", "lora", "dora", "qlora", "qdora"]
HEADS = ["lora_head", "dora_head"]  # adapters on the output head too, which a tied one cannot have
WIDTHS = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 512}
# name: builder, its arguments, what config.json says of them, the kinds of student
EVERY_DAY = ("llama", "qwen")  # the others at night
MODELS = {
    "llama": (
        "torchtune.models.llama3_1.{}llama3_1",
        WIDTHS,
        {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": 8.0},
        KINDS + HEADS,
    ),
    "llama_tied": (
        "torchtune.models.llama3_2.{}llama3_2",
        WIDTHS | {"tie_word_embeddings": True},
        {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": 32.0},
        KINDS,
    ),
    "qwen": (
        "torchtune.models.qwen2.{}qwen2",
        WIDTHS | {"rope_base": 1e6, "norm_eps": 1e-6},
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6},
        KINDS + HEADS,
    ),
    "qwen_tied": (
        "torchtune.models.qwen2.{}qwen2",
        WIDTHS | {"rope_base": 1e6, "norm_eps": 1e-6, "tie_word_embeddings": True},
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6},
        KINDS,
    ),
    # heads and widths of SmolLM2 135M, which NF4 cannot hold
    "smollm2": (
        "torchtune.models.llama3_2.{}llama3_2",
        WIDTHS
        | {"num_heads": 9, "num_kv_heads": 3, "embed_dim": 576, "intermediate_dim": 768}
        | {"rope_base": 100_000, "scale_factor": 1, "tie_word_embeddings": True},
        {"rope_theta": 1e5, "rms_norm_eps": 1e-5},
        ["full", "lora", "dora"],
    ),
    # as many key heads as SmolLM2 1.7B has query heads
    "smollm2_1_7b": (
        "torchtune.models.llama3_2.{}llama3_2",
        WIDTHS | {"num_kv_heads": 4, "rope_base": 100_000, "scale_factor": 1, "tie_word_embeddings": True},
        {"rope_theta": 1e5, "rms_norm_eps": 1e-5},
        ["qlora", "qdora"],
    ),
}
TOKENS = [(7 * i) % 250 + 3 for i in range(24)]


def section(builder: str, arguments: dict[str, Any], kind: str = "full") -> dict[str, Any]:
    """YAML of a model; ``kind`` is one of KINDS or HEADS."""
    made = {
        "_component_": builder.format("" if kind == "full" else "lora_"),
        "vocab_size": VOCAB,
        "max_seq_len": 64,
        **arguments,
    }
    if kind != "full":
        made |= {
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": kind.endswith("head"),
            "lora_rank": 4,
            "lora_alpha": 6,
            "use_dora": "dora" in kind,
            "quantize_base": kind.startswith("q"),
        }
    return made


def to_hugging_face(name: str, weights: dict[str, torch.Tensor], sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    convert = qwen2_tune_to_hf if name.startswith("qwen") else tune_to_hf
    converted = convert(weights, sizes["num_heads"], sizes["num_kv_heads"], sizes["embed_dim"])
    return {key: weight.contiguous() for key, weight in converted.items()}


def write_base(folder: Path, name: str, weights: dict[str, torch.Tensor]) -> Path:
    """A Hugging Face folder of a model in torchtune's names."""
    _, sizes, more, _ = MODELS[name]
    folder.mkdir(parents=True)
    converted = to_hugging_face(name, weights, sizes)
    if name == "qwen_tied":  # torchtune skips a tied head that a file holds nevertheless
        converted["lm_head.weight"] = converted["model.embed_tokens.weight"].clone()
    save_file(converted, folder / "model.safetensors", metadata={"format": "pt"})
    more = dict(more)
    if "rope_scaling" in more:
        more["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": more["rope_scaling"],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    architecture, kind = ("Qwen2ForCausalLM", "qwen2") if name.startswith("qwen") else ("LlamaForCausalLM", "llama")
    described = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": sizes["embed_dim"],
        "intermediate_size": sizes["intermediate_dim"],
        "num_attention_heads": sizes["num_heads"],
        "num_hidden_layers": sizes["num_layers"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "tie_word_embeddings": sizes.get("tie_word_embeddings", False),
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(described))
    write_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def base_weights(name: str) -> dict[str, torch.Tensor]:
    """Random bf16 weights, norms and biases included, which builders start at one and near zero."""
    builder, arguments, _, _ = MODELS[name]
    torch.manual_seed(3)
    model = config.instantiate(OmegaConf.create(section(builder, arguments)))
    weights = model.state_dict()
    for key, weight in weights.items():
        if weight.dim() == 1:
            weights[key] = weight + 0.3 * torch.randn_like(weight)
    weights["tok_embeddings.weight"] *= 0.05  # else logits of a tied head are in the hundreds
    return {key: weight.bfloat16() for key, weight in weights.items()}


@torch.no_grad()
def train(tmp_path: Path, name: str, kind: str, base: Path, weights: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Run the recipe for two steps; returns the cases: loader, folders, and the logits [S, V] that it has to give."""
    builder, arguments, _, _ = MODELS[name]
    folder = tmp_path / kind
    model_type = "QWEN2" if name.startswith("qwen") else "LLAMA3_2"
    cfg = make_config(
        folder,
        max_steps_per_epoch=2,
        optimizer__lr=2e-2,
        checkpointer__checkpoint_dir=str(base),
        checkpointer__model_type=model_type,
    )
    cfg.model = section(builder, arguments, kind)
    with torch.enable_grad():
        run = run_in_process(cfg)
    decoder, tokens = run.student.decoder.eval(), torch.tensor([TOKENS])
    trained = decoder.output(decoder(tokens))[0]
    export = folder / "out" / "epoch_0"
    cases = {"merged": ("merged", [export], trained)}
    if kind == "full":
        return cases
    state = full_state_dict(decoder, run.world)
    adapter = {key: value for key, value in state.items() if "lora" in key or "magnitude" in key}
    assert all(value.any() for value in adapter.values())
    whole = config.instantiate(OmegaConf.create(section(builder, arguments, kind.removeprefix("q"))))
    leave_biases_unscaled(whole)
    whole.load_state_dict({key: value.float() for key, value in weights.items()} | adapter)
    on_base = whole.eval()(tokens)[0]
    cases |= {
        "adapter alone": ("adapter_alone", [export / "adapter"], on_base),
        "adapter on base": ("adapter_on", [base, export / "adapter"], on_base),
        "adapter merged by peft": ("adapter_merged_by_peft", [base, export / "adapter"], on_base),
    }
    if kind.startswith("q"):  # trained on weights that NF4 has rounded: on these the adapter gives what was trained
        rounded = {key: value for key, value in state.items() if key not in adapter}
        rounded_base = write_base(folder / "rounded", name, rounded)
        cases["adapter on rounded base"] = ("adapter_on", [rounded_base, export / "adapter"], trained)
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [one if one in EVERY_DAY else pytest.param(one, marks=pytest.mark.nightly) for one in MODELS]
)
def test_exports_give_the_logits_of_the_student(tmp_path, name):
    python = exports_python()
    weights = base_weights(name)
    base = write_base(tmp_path / "base", name, weights)
    cases = {}
    for kind in MODELS[name][3]:
        cases |= {f"{kind}, {case}": value for case, value in train(tmp_path, name, kind, base, weights).items()}
    asked = {case: (loader, [str(path) for path in paths], TOKENS) for case, (loader, paths, _) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(asked))
    command = [python, Path(__file__).with_name("load_exports.py"), tmp_path / "cases.json", tmp_path / "logits"]
    # nothing of the checkout or of the environment of torchtune
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    found = load_file(tmp_path / "logits") if (tmp_path / "logits").is_file() else {}
    apart = {}
    for case, (_, _, logits) in cases.items():
        apart[case] = (found[case] - logits).abs().max().item() if case in found else float("nan")
        print(f"{name}, {case}: {apart[case]:.1e} of logits up to {logits.abs().max():.1f}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert not {case: value for case, value in apart.items() if not value <= 1e-4}
