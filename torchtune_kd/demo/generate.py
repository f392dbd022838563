"""Load a model of the demo, let it write, and time it. Batch size is 1 throughout."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchtune import training
from torchtune.models.convert_weights import hf_to_tune
from torchtune.modules import TransformerDecoder

from torchtune_kd.models.smollm2 import smollm2_135m


def load_model(folder: Path, num_layers: int, dtype: torch.dtype) -> TransformerDecoder:
    """A SmolLM2 135M of ``num_layers`` layers with the weights of a Hugging Face folder, in eval mode."""
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


def num_parameters(model: TransformerDecoder) -> int:
    """Weights of the model, the tied embedding once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def greedy(
    model: TransformerDecoder, prompt: Sequence[int], num_tokens: int, stop_tokens: Sequence[int] = ()
) -> list[int]:
    """The most likely token after the prompt, and so on, with key-value caches.

    Args:
        model (TransformerDecoder): Model with caches set up for ``len(prompt) + num_tokens`` tokens, see
            :func:`with_caches`.
        prompt (Sequence[int]): Token ids.
        num_tokens (int): Tokens to generate, at most.
        stop_tokens (Sequence[int]): Ids that end the text; they are not returned. Default none.

    Returns:
        list[int]: The generated ids.
    """
    model.reset_caches()
    length = model.decoder_max_cache_seq_len
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    step = torch.tensor([list(prompt)])
    position = 0
    generated: list[int] = []
    while len(generated) < num_tokens:
        positions = torch.arange(position, position + step.shape[1])
        logits = model(step, mask=causal[positions].unsqueeze(0), input_pos=positions.unsqueeze(0))
        token = int(logits[0, -1].argmax())
        if token in stop_tokens:
            break
        generated.append(token)
        position += step.shape[1]
        step = torch.tensor([[token]])
    return generated


def with_caches(model: TransformerDecoder, length: int) -> TransformerDecoder:
    """Set up key-value caches of batch size 1 and ``length`` tokens; a model takes them once."""
    model.setup_caches(batch_size=1, dtype=next(model.parameters()).dtype, decoder_max_seq_len=length)
    return model


def tokens_per_second(
    models: Sequence[TransformerDecoder], prompt: Sequence[int], num_tokens: int, repeats: int = 3
) -> list[float]:
    """Tokens that each model generates per second after the same prompt, the prompt's own pass included.

    The models take turns, so that a slow moment of the machine meets all of them. Median of ``repeats`` runs after
    one to warm up.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            generated = greedy(model, prompt, num_tokens)
            if repeat:
                times.append((time.perf_counter() - start) / len(generated))
    return [1 / statistics.median(times) for times in seconds]
