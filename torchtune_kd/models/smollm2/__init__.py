"""SmolLM2: builders and tokenizer."""

from torchtune_kd.models.smollm2.model_builders import (
    lora_smollm2_1_7b,
    lora_smollm2_135m,
    lora_smollm2_360m,
    qlora_smollm2_1_7b,
    smollm2_1_7b,
    smollm2_135m,
    smollm2_360m,
)
from torchtune_kd.models.smollm2.tokenizer import SmolLM2Tokenizer, smollm2_tokenizer

__all__ = [
    "SmolLM2Tokenizer",
    "lora_smollm2_1_7b",
    "lora_smollm2_135m",
    "lora_smollm2_360m",
    "qlora_smollm2_1_7b",
    "smollm2_1_7b",
    "smollm2_135m",
    "smollm2_360m",
    "smollm2_tokenizer",
]
