"""A small Llama in a GGUF file, and its forward pass written here."""

from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, BASE, EPS = 2, 64, 4, 2, 16, 96, 5000.0, 1e-5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "he", "Ġt", "12", "<extra>"]
MERGES = ["h e", "Ġ t", "1 2"]
TEMPLATE = "{{ messages }}"


def random_weights(tied: bool) -> dict[str, Tensor]:
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


def write_gguf(path: Path, weights: dict[str, Tensor], *, arch: str = "llama", quantise: str = "", **fields) -> Path:
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


def rotate_pairs(x: Tensor) -> Tensor:
    """Rotary embedding of GGUF and Meta: coordinates 2i and 2i + 1 turn together. x: [S, heads, head_dim]."""
    angles = torch.arange(len(x))[:, None] / BASE ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)  # [S, head_dim / 2]
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


def rotate_halves(x: Tensor) -> Tensor:
    """Rotary embedding of Hugging Face: coordinates i and i + head_dim / 2 turn together."""
    angles = torch.arange(len(x))[:, None] / BASE ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = angles.cos().repeat(1, 2).unsqueeze(1), angles.sin().repeat(1, 2).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def llama_logits(weights: dict[str, Tensor], names: dict[str, str], rotate, tokens: Tensor) -> Tensor:
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
