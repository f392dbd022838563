"""GGUF conversion against a forward pass written here, once for each of the two rotary orders."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor
from torchtune.models.llama3_2 import llama3_2
from torchtune.training import FullModelHFCheckpointer

import torchtune_kd.tools.gguf_reader as gguf_module
from torchtune_kd.tools import gguf_to_hf
from torchtune_kd.tools.gguf import main

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, BASE, EPS = 2, 64, 4, 2, 16, 96, 5000.0, 1e-5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "he", "Ġt", "12", "<extra>"]
MERGES = ["h e", "Ġ t", "1 2"]
TEMPLATE = "{{ messages }}"


def _weights(tied: bool) -> dict[str, Tensor]:
    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    weights = {"token_embd.weight": matrix(len(TOKENS), WIDTH), "output_norm.weight": 1 + 0.1 * torch.randn(WIDTH)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": 1 + 0.1 * torch.randn(WIDTH),
            "attn_q": matrix(HEADS * HEAD_DIM, WIDTH),
            "attn_k": matrix(KV_HEADS * HEAD_DIM, WIDTH),
            "attn_v": matrix(KV_HEADS * HEAD_DIM, WIDTH),
            "attn_output": matrix(WIDTH, WIDTH),
            "ffn_norm": 1 + 0.1 * torch.randn(WIDTH),
            "ffn_gate": matrix(MLP, WIDTH),
            "ffn_up": matrix(MLP, WIDTH),
            "ffn_down": matrix(WIDTH, MLP),
        }
        weights.update({f"blk.{layer}.{name}.weight": weight for name, weight in block.items()})
    if not tied:
        weights["output.weight"] = matrix(len(TOKENS), WIDTH)
    return weights


def _write_gguf(path: Path, weights: dict[str, Tensor], *, arch: str = "llama", quantise: str = "", **fields) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model(fields.get("tokenizer_model", "gpt2"))
    if fields.get("pre", "smollm"):
        writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    control, user_defined, normal = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL
    kinds = [control] * len(SPECIAL) + [normal] * (len(TOKENS) - len(SPECIAL) - 1) + [user_defined]
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if "rope_scaling" in fields:
        writer.add_rope_scaling_type(fields["rope_scaling"])
    if "split_count" in fields:
        writer.add_uint16("split.count", fields["split_count"])
    for name, weight in weights.items():
        if quantise and name.endswith(quantise):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rotate_pairs(x: Tensor) -> Tensor:
    """Rotary embedding of GGUF and Meta: coordinates 2i and 2i + 1 turn together. x: [S, heads, head_dim]."""
    angles = torch.arange(len(x))[:, None] / BASE ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)  # [S, head_dim / 2]
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


def _rotate_halves(x: Tensor) -> Tensor:
    """Rotary embedding of Hugging Face: coordinates i and i + head_dim / 2 turn together."""
    angles = torch.arange(len(x))[:, None] / BASE ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = angles.cos().repeat(1, 2).unsqueeze(1), angles.sin().repeat(1, 2).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _logits(weights: dict[str, Tensor], names: dict[str, str], rotate, tokens: Tensor) -> Tensor:
    """A Llama forward pass of one sequence; ``names`` maps GGUF's names to the checkpoint's."""

    def weight(name: str) -> Tensor:
        return weights[names.get(name, name) + ".weight"]

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * scale

    h = weight("token_embd")[tokens]  # [S, D]
    for layer in range(LAYERS):
        part = {name: weight(f"blk.{layer}.{name}") for name in BLOCK}
        x = norm(h, part["attn_norm"])
        q = rotate((x @ part["attn_q"].T).view(-1, HEADS, HEAD_DIM))
        k = rotate((x @ part["attn_k"].T).view(-1, KV_HEADS, HEAD_DIM)).repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = (x @ part["attn_v"].T).view(-1, KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(len(h), len(h)).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        h = h + mixed @ part["attn_output"].T
        x = norm(h, part["ffn_norm"])
        h = h + (F.silu(x @ part["ffn_gate"].T) * (x @ part["ffn_up"].T)) @ part["ffn_down"].T
    h = norm(h, weight("output_norm"))
    head = names.get("output", "output") + ".weight"
    return h @ (weights[head] if head in weights else weight("token_embd")).T


BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"} | {
    f"blk.{layer}.{name}": f"model.layers.{layer}.{hf_name}"
    for layer in range(LAYERS)
    for name, hf_name in BLOCK.items()
}


@pytest.mark.parametrize("tied", [True, False])
def test_conversion_keeps_what_the_model_computes(tmp_path: Path, tied: bool) -> None:
    weights = _weights(tied)
    folder = gguf_to_hf(_write_gguf(tmp_path / "m.gguf", weights), tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, len(TOKENS), (40,))
    expected = _logits(weights, {}, _rotate_pairs, tokens)

    converted = load_file(folder / "model.safetensors")
    names = {name for gguf_name, name in HF_NAMES.items() if gguf_name != "output" or not tied}
    assert converted.keys() == {f"{name}.weight" for name in names}
    torch.testing.assert_close(_logits(converted, HF_NAMES, _rotate_halves, tokens), expected, atol=1e-4, rtol=1e-4)

    model = llama3_2(
        vocab_size=len(TOKENS),
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        embed_dim=WIDTH,
        intermediate_dim=MLP,
        max_seq_len=128,
        rope_base=BASE,
        scale_factor=1,
        tie_word_embeddings=tied,
    )
    checkpointer = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "LLAMA3_2", str(tmp_path / "out"))
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    torch.testing.assert_close(model(tokens[None])[0], expected, atol=1e-4, rtol=1e-4)


def test_quantised_tensors_and_dtype(tmp_path: Path) -> None:
    weights = _weights(tied=True)
    path = _write_gguf(tmp_path / "m.gguf", weights, quantise="ffn_up.weight")
    converted = load_file(gguf_to_hf(path, tmp_path / "hf") / "model.safetensors")
    assert {weight.dtype for weight in converted.values()} == {torch.bfloat16}
    up, exact = converted["model.layers.1.mlp.up_proj.weight"].float(), weights["blk.1.ffn_up.weight"]
    # 8 bits a block of 32 and bfloat16: half a step of 1/127 of the largest value, and 2^-9 of each value
    tolerance = exact.view(MLP, -1, 32).abs().amax(-1).repeat_interleave(32, -1) / 254 * 1.01 + exact.abs() * 2**-8
    assert ((up - exact).abs() <= tolerance).all()
    assert not torch.equal(up, exact.bfloat16().float())


def test_config_and_tokenizer_files(tmp_path: Path) -> None:
    folder = gguf_to_hf(_write_gguf(tmp_path / "m.gguf", _weights(tied=True)), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": len(TOKENS),
        "max_position_embeddings": 128,
        "rms_norm_eps": EPS,
        "rope_theta": BASE,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {name: config[name] for name in expected} == expected
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == TEMPLATE
    assert tokenizer_config["eos_token"] == "<|im_end|>"

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(TOKENS)
    encoded = tokenizer.encode("<|im_start|>he t12<extra>")
    # the merge "1 2" never applies: digits stand alone
    assert encoded.tokens == ["<|im_start|>", "he", "Ġt", "1", "2", "<extra>"]
    assert tokenizer.decode(encoded.ids) == "he t12<extra>"  # control tokens are special, user-defined ones are not


def test_other_pre_tokenizer_keeps_digits_together(tmp_path: Path) -> None:
    folder = gguf_to_hf(_write_gguf(tmp_path / "m.gguf", _weights(tied=True), pre="gpt-2"), tmp_path / "hf")
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("12").tokens == ["12"]


def test_same_conversion_is_not_repeated_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "m.gguf", _weights(tied=True))
    folder = gguf_to_hf(path, tmp_path / "hf")
    before = (folder / "model.safetensors").stat()
    gguf_to_hf(path, folder)
    assert (folder / "model.safetensors").stat() == before
    with pytest.raises(ValueError, match="already holds files; choose another one or pass overwrite=True"):
        gguf_to_hf(path, folder, dtype=torch.float32)
    gguf_to_hf(path, folder, dtype=torch.float32, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    assert {entry.name for entry in tmp_path.iterdir()} == {"m.gguf", "hf"}


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    path = _write_gguf(tmp_path / "m.gguf", _weights(tied=True))
    monkeypatch.setattr(gguf_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf_to_hf(path, tmp_path / "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, r"architecture 'llama', but .*m\.gguf holds 'qwen2'"),
        ({"rope_scaling": gguf.RopeScalingType.YARN}, r"plain rotary embeddings, but .*m\.gguf scales them"),
        ({"tokenizer_model": "llama"}, r"byte-level BPE tokenizer .* holds 'llama'"),
        ({"pre": "qwen2"}, "split as 'qwen2'; use the publisher's own"),
        ({"pre": "default"}, "split as 'default'; use the publisher's own"),
        ({"pre": None}, "split as None; use the publisher's own"),
        ({"split_count": 3}, r"in one piece, but .*m\.gguf is one of 3 parts; merge them"),
    ],
)
def test_unsupported_files(tmp_path: Path, options: dict, message: str) -> None:
    path = _write_gguf(tmp_path / "m.gguf", _weights(tied=True), **options)
    with pytest.raises(ValueError, match=message):
        gguf_to_hf(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", f"blk.{LAYERS}.ffn_up.weight"])
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    weights = _weights(tied=True) | {name: torch.zeros(WIDTH)}
    with pytest.raises(ValueError, match=f"holds the tensor '{re.escape(name)}', which is no part .* of 2 layers"):
        gguf_to_hf(_write_gguf(tmp_path / "m.gguf", weights), tmp_path / "hf")


@pytest.mark.parametrize("lost", ["blk.1.", "blk.0.ffn_up.weight", "token_embd.weight"])
def test_missing_tensors(tmp_path: Path, lost: str) -> None:
    weights = {name: weight for name, weight in _weights(tied=False).items() if not name.startswith(lost)}
    count = {"blk.1.": 9}.get(lost, 1)
    with pytest.raises(ValueError, match=f"Expected 21 tensors for the 2 layers .* but {count} are missing.*'{lost}"):
        gguf_to_hf(_write_gguf(tmp_path / "m.gguf", weights), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_padded_embedding(tmp_path: Path) -> None:
    weights = _weights(tied=True)
    weights["token_embd.weight"] = F.pad(weights["token_embd.weight"], (0, 0, 0, 64 - len(TOKENS) % 64))
    rows = len(weights["token_embd.weight"])
    path = _write_gguf(tmp_path / "m.gguf", weights, quantise="token_embd.weight")
    folder = gguf_to_hf(path, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows > len(TOKENS)
    assert len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"]) == rows

    weights["token_embd.weight"] = weights["token_embd.weight"][: len(TOKENS) - 1]
    path = _write_gguf(tmp_path / "less.gguf", weights)
    with pytest.raises(ValueError, match=f"each of the {len(TOKENS)} tokens in .*, but got {len(TOKENS) - 1}"):
        gguf_to_hf(path, tmp_path / "less")


def test_the_file_itself_is_never_replaced(tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "m.gguf", _weights(tied=True))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"does not hold the source .*m\.gguf"):
        gguf_to_hf(path, tmp_path, overwrite=True)
    assert path.is_file()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.gguf does not exist"):
        gguf_to_hf(tmp_path / "no.gguf", tmp_path / "hf")
    (tmp_path / "text.gguf").write_text("something else entirely, and long enough for a header")
    with pytest.raises(ValueError, match=r"text.gguf is not a readable GGUF file"):
        gguf_to_hf(tmp_path / "text.gguf", tmp_path / "hf")
    whole = _write_gguf(tmp_path / "whole.gguf", _weights(tied=True)).read_bytes()
    for length in (len(whole) // 2, len(whole) - 1000, 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.gguf is not a readable GGUF file"):
            gguf_to_hf(tmp_path / "cut.gguf", tmp_path / "hf")


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'torchtune-kd\[demo\]'"):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")


def _said(capsys, argv: list[str]) -> str:
    """The one sentence with which the command refuses something."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_command_line_writes_what_the_function_writes(tmp_path: Path, capsys) -> None:
    path = _write_gguf(tmp_path / "m.gguf", _weights(tied=True))
    expected = load_file(gguf_to_hf(path, tmp_path / "function", torch.float32) / "model.safetensors")
    argv = [str(path), str(tmp_path / "command")]
    main([*argv, "--dtype", "fp32"])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'command'}: m.gguf" in said and "2 layers in fp32" in said and "tokenizer.json" in said
    written = load_file(tmp_path / "command" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)

    assert "already holds files; choose another one or pass --overwrite." in _said(capsys, argv)
    main([*argv, "--overwrite"])
    assert load_file(tmp_path / "command" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_command_line_mistakes(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = _write_gguf(tmp_path / "m.gguf", _weights(tied=True)), tmp_path / "hf"
    (tmp_path / "text.gguf").write_text("something else entirely, and long enough for a header")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{ no JSON")
    before = set(tmp_path.rglob("*"))
    assert "no.gguf does not exist" in _said(capsys, [str(tmp_path / "no.gguf"), str(output)])
    assert "text.gguf is not a readable GGUF file" in _said(capsys, [str(tmp_path / "text.gguf"), str(output)])
    assert f"{tmp_path / 'taken'} already holds files" in _said(capsys, [str(path), str(tmp_path / "taken")])
    assert "m.gguf" in _said(capsys, [str(path), str(path / "below a file")])
    for length in (0, 1, 4, 10, 23):
        (tmp_path / "text.gguf").write_bytes(path.read_bytes()[:length])
        assert "text.gguf is not a readable GGUF file" in _said(capsys, [str(tmp_path / "text.gguf"), str(output)])
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'torchtune-kd[demo]'" in _said(capsys, [str(path), str(output)])
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.heavy
def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchtune_kd.tools.gguf", "no.gguf", "hf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: Expected a GGUF file, but no.gguf does not exist; check the path."
    assert "RuntimeWarning" not in done.stderr
