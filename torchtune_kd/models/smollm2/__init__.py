"""SmolLM2: builders, tokenizer, and a copy of the 135M model that needs no model hub."""

from torchtune_kd.models.smollm2._model_builders import (
    lora_smollm2_1_7b,
    lora_smollm2_135m,
    lora_smollm2_360m,
    qlora_smollm2_1_7b,
    smollm2_1_7b,
    smollm2_135m,
    smollm2_360m,
)
from torchtune_kd.models.smollm2._tokenizer import SmolLM2Tokenizer, smollm2_tokenizer
from torchtune_kd.models.smollm2.assets import fetch_smollm2

__all__ = [
    "SmolLM2Tokenizer",
    "fetch_smollm2",
    "lora_smollm2_1_7b",
    "lora_smollm2_135m",
    "lora_smollm2_360m",
    "qlora_smollm2_1_7b",
    "smollm2_1_7b",
    "smollm2_135m",
    "smollm2_360m",
    "smollm2_tokenizer",
]
