"""GGUF conversion against a forward pass written here, once for each of the two rotary orders."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torchtune.models.llama3_2 import llama3_2
from torchtune.training import FullModelHFCheckpointer

import torchtune_kd.tools.gguf_reader as gguf_module
from helpers.gguf_llama import (
    BASE,
    EPS,
    HEAD_DIM,
    HEADS,
    HF_NAMES,
    KV_HEADS,
    LAYERS,
    MLP,
    TEMPLATE,
    TOKENS,
    WIDTH,
    llama_logits,
    random_weights,
    rotate_halves,
    rotate_pairs,
    write_gguf,
)
from torchtune_kd.tools import gguf_to_hf
from torchtune_kd.tools.gguf import main


@pytest.mark.parametrize("tied", [True, False])
def test_conversion_keeps_what_the_model_computes(tmp_path: Path, tied: bool) -> None:
    weights = random_weights(tied)
    folder = gguf_to_hf(write_gguf(tmp_path / "m.gguf", weights), tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, len(TOKENS), (40,))
    expected = llama_logits(weights, {}, rotate_pairs, tokens)

    converted = load_file(folder / "model.safetensors")
    names = {name for gguf_name, name in HF_NAMES.items() if gguf_name != "output" or not tied}
    assert converted.keys() == {f"{name}.weight" for name in names}
    torch.testing.assert_close(llama_logits(converted, HF_NAMES, rotate_halves, tokens), expected, atol=1e-4, rtol=1e-4)

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
    weights = random_weights(tied=True)
    path = write_gguf(tmp_path / "m.gguf", weights, quantise="ffn_up.weight")
    converted = load_file(gguf_to_hf(path, tmp_path / "hf") / "model.safetensors")
    assert {weight.dtype for weight in converted.values()} == {torch.bfloat16}
    up, exact = converted["model.layers.1.mlp.up_proj.weight"].float(), weights["blk.1.ffn_up.weight"]
    # 8 bits a block of 32 and bfloat16: half a step of 1/127 of the largest value, and 2^-9 of each value
    tolerance = exact.view(MLP, -1, 32).abs().amax(-1).repeat_interleave(32, -1) / 254 * 1.01 + exact.abs() * 2**-8
    assert ((up - exact).abs() <= tolerance).all()
    assert not torch.equal(up, exact.bfloat16().float())


def test_config_and_tokenizer_files(tmp_path: Path) -> None:
    folder = gguf_to_hf(write_gguf(tmp_path / "m.gguf", random_weights(tied=True)), tmp_path / "hf")
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
    folder = gguf_to_hf(write_gguf(tmp_path / "m.gguf", random_weights(tied=True), pre="gpt-2"), tmp_path / "hf")
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("12").tokens == ["12"]


def test_same_conversion_is_not_repeated_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_weights(tied=True))
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

    path = write_gguf(tmp_path / "m.gguf", random_weights(tied=True))
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
    path = write_gguf(tmp_path / "m.gguf", random_weights(tied=True), **options)
    with pytest.raises(ValueError, match=message):
        gguf_to_hf(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", f"blk.{LAYERS}.ffn_up.weight"])
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    weights = random_weights(tied=True) | {name: torch.zeros(WIDTH)}
    with pytest.raises(ValueError, match=f"holds the tensor '{re.escape(name)}', which is no part .* of 2 layers"):
        gguf_to_hf(write_gguf(tmp_path / "m.gguf", weights), tmp_path / "hf")


@pytest.mark.parametrize("lost", ["blk.1.", "blk.0.ffn_up.weight", "token_embd.weight"])
def test_missing_tensors(tmp_path: Path, lost: str) -> None:
    weights = {name: weight for name, weight in random_weights(tied=False).items() if not name.startswith(lost)}
    count = {"blk.1.": 9}.get(lost, 1)
    with pytest.raises(ValueError, match=f"Expected 21 tensors for the 2 layers .* but {count} are missing.*'{lost}"):
        gguf_to_hf(write_gguf(tmp_path / "m.gguf", weights), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_padded_embedding(tmp_path: Path) -> None:
    weights = random_weights(tied=True)
    weights["token_embd.weight"] = F.pad(weights["token_embd.weight"], (0, 0, 0, 64 - len(TOKENS) % 64))
    rows = len(weights["token_embd.weight"])
    path = write_gguf(tmp_path / "m.gguf", weights, quantise="token_embd.weight")
    folder = gguf_to_hf(path, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows > len(TOKENS)
    assert len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"]) == rows

    weights["token_embd.weight"] = weights["token_embd.weight"][: len(TOKENS) - 1]
    path = write_gguf(tmp_path / "less.gguf", weights)
    with pytest.raises(ValueError, match=f"each of the {len(TOKENS)} tokens in .*, but got {len(TOKENS) - 1}"):
        gguf_to_hf(path, tmp_path / "less")


def test_the_file_itself_is_never_replaced(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_weights(tied=True))
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
    whole = write_gguf(tmp_path / "whole.gguf", random_weights(tied=True)).read_bytes()
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
    path = write_gguf(tmp_path / "m.gguf", random_weights(tied=True))
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
    path, output = write_gguf(tmp_path / "m.gguf", random_weights(tied=True)), tmp_path / "hf"
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
