"""Builders of the SmolLM2 models (Ben Allal et al. 2025, https://arxiv.org/abs/2502.02737).

They are Llama-architecture decoders with tied embeddings and plain rotary embeddings, so torchtune's Llama
3.2 component builders make them; ``scale_factor=1`` switches Llama 3's RoPE scaling off.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerDecoder

from torchtune_kd.models.nf4 import check_nf4_build

_SHARED = {"vocab_size": 49_152, "max_seq_len": 8192, "norm_eps": 1e-5, "scale_factor": 1}
_CONFIGS: dict[str, dict[str, Any]] = {
    "135m": {
        **_SHARED,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "embed_dim": 576,
        "intermediate_dim": 1536,
        "rope_base": 100_000,
    },
    "360m": {
        **_SHARED,
        "num_layers": 32,
        "num_heads": 15,
        "num_kv_heads": 5,
        "embed_dim": 960,
        "intermediate_dim": 2560,
        "rope_base": 100_000,
    },
    "1_7b": {
        **_SHARED,
        "num_layers": 24,
        "num_heads": 32,
        "num_kv_heads": 32,
        "embed_dim": 2048,
        "intermediate_dim": 8192,
        "rope_base": 130_000,
    },
}


def smollm2_135m(num_layers: int | None = None) -> TransformerDecoder:
    """Build SmolLM2 135M: 30 layers, width 576, 134.5 million parameters, context of 8192 tokens.

    Args:
        num_layers (int | None): Number of layers, for a layer-pruned student. Default: all 30.

    Returns:
        TransformerDecoder: The model.

    Raises:
        ValueError: If ``num_layers`` is below 1 or above the model's own number.
    """
    return llama3_2(**_config("135m", num_layers))


def smollm2_360m(num_layers: int | None = None) -> TransformerDecoder:
    """Build SmolLM2 360M: 32 layers, width 960. See :func:`smollm2_135m` for ``num_layers``."""
    return llama3_2(**_config("360m", num_layers))


def smollm2_1_7b(num_layers: int | None = None) -> TransformerDecoder:
    """Build SmolLM2 1.7B: 24 layers, width 2048. See :func:`smollm2_135m` for ``num_layers``."""
    return llama3_2(**_config("1_7b", num_layers))


def _config(size: str, num_layers: int | None) -> dict[str, Any]:
    config = _CONFIGS[size]
    if num_layers is None:
        return config
    if not 1 <= num_layers <= config["num_layers"]:
        raise ValueError(
            f"Expected num_layers between 1 and {config['num_layers']}, the layers of SmolLM2 "
            f"{_display_name(size)}, but got {num_layers}; choose a number in that range."
        )
    return {**config, "num_layers": num_layers}


def _display_name(size: str) -> str:
    return size.replace("_", ".").upper()


def _lora_builder(size: str) -> Callable[..., TransformerDecoder]:
    def build(
        lora_attn_modules: Sequence[str],
        apply_lora_to_mlp: bool = False,
        apply_lora_to_output: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        quantize_base: bool = False,
        num_layers: int | None = None,
    ) -> TransformerDecoder:
        """Build SmolLM2 with LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024).

        Args:
            lora_attn_modules (Sequence[str]): Attention projections to adapt, of ``q_proj``, ``k_proj``,
                ``v_proj``, ``output_proj``.
            apply_lora_to_mlp (bool): Adapt the MLP too. Default False.
            apply_lora_to_output (bool): Must be False: the output is tied to the embedding.
            lora_rank (int): Rank of each low-rank update. Default 8.
            lora_alpha (float): The update is scaled by ``lora_alpha / lora_rank``. Default 16.
            lora_dropout (float): Dropout probability in front of the update. Default 0.0.
            use_dora (bool): Learn magnitude and direction apart. Default False.
            quantize_base (bool): Hold the frozen weights in NF4. The 135M and 360M models have shapes that NF4
                cannot hold, so this is an error there; SmolLM2 1.7B can be quantised. Default False.
            num_layers (int | None): Number of layers, for a layer-pruned student. Default: all.

        Returns:
            TransformerDecoder: The model with adapters.

        Raises:
            ValueError: If ``num_layers`` is out of range, ``apply_lora_to_output`` is True, or ``quantize_base``
                asks for a shape that NF4 cannot hold.
        """
        lora = partial(
            lora_llama3_2,
            **_config(size, num_layers),
            lora_attn_modules=list(lora_attn_modules),
            apply_lora_to_mlp=apply_lora_to_mlp,
            apply_lora_to_output=apply_lora_to_output,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_dora=use_dora,
            quantize_base=quantize_base,
        )
        if quantize_base:
            check_nf4_build(lora)
        return lora()

    build.__name__ = build.__qualname__ = f"lora_smollm2_{size}"
    build.__doc__ = (build.__doc__ or "").replace("Build SmolLM2", f"Build SmolLM2 {_display_name(size)}")
    return build


lora_smollm2_135m = _lora_builder("135m")
lora_smollm2_360m = _lora_builder("360m")
lora_smollm2_1_7b = _lora_builder("1_7b")
qlora_smollm2_1_7b = partial(lora_smollm2_1_7b, quantize_base=True)
qlora_smollm2_1_7b.__doc__ = """Build SmolLM2 1.7B with LoRA on NF4 weights (QLoRA, Dettmers et al. 2023).

The 135M and 360M models have no such builder: NF4 cannot hold their shapes.
"""
