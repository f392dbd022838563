"""Load a model of the demo, let it write, and time it. Batch size is 1 throughout."""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    model: TransformerDecoder,
    prompt: Sequence[int],
    num_tokens: int,
    stop_tokens: Sequence[int] = (),
    seconds: float = math.inf,
) -> list[int]:
    """The most likely token after the prompt, and so on, with key-value caches.

    Args:
        model (TransformerDecoder): Model with caches set up for ``len(prompt) + num_tokens`` tokens, see
            :func:`with_caches`.
        prompt (Sequence[int]): Token ids.
        num_tokens (int): Tokens to generate, at most.
        stop_tokens (Sequence[int]): Ids that end the text; they are not returned. Default none.
        seconds (float): Time after which no further token is begun; there is one in any case. Default unlimited.

    Returns:
        list[int]: The generated ids.
    """
    end = time.monotonic() + seconds
    model.reset_caches()
    length = model.decoder_max_cache_seq_len
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    step = torch.tensor([list(prompt)])
    position = 0
    generated: list[int] = []
    while len(generated) < num_tokens and not (generated and time.monotonic() >= end):
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


class Speeds(NamedTuple):
    """What :func:`tokens_per_second` measured."""

    per_second: list[float]  # of each model
    tokens: int  # of the shortest text
    repeats: int


def tokens_per_second(
    models: Sequence[TransformerDecoder],
    prompt: Sequence[int],
    num_tokens: int,
    repeats: int = 3,
    seconds: float = math.inf,
) -> Speeds:
    """Measure how many tokens each model generates per second after the same prompt, the prompt's own pass included.

    The models take turns, so that a slow moment of the machine meets all of them. Median of ``repeats`` rounds after
    one to warm up. About ``seconds`` are enough: one round is timed in any case, of shorter texts if need be.
    """
    times: list[list[float]] = [[] for _ in models]
    end, tokens = time.monotonic() + seconds, num_tokens
    for repeat in range(repeats + 1):
        if repeat > 1 and time.monotonic() >= end:
            break
        for model, own in zip(models, times, strict=True):
            start = time.perf_counter()
            generated = greedy(model, prompt, num_tokens, seconds=seconds / (2 * len(models)))
            if repeat:
                own.append((time.perf_counter() - start) / len(generated))
                tokens = min(tokens, len(generated))
    return Speeds([1 / statistics.median(own) for own in times], tokens, len(times[0]))


@torch.inference_mode()
def seconds_per_token(model: TransformerDecoder, num_tokens: int) -> float:
    """Measure what the layers take a token to read a row of ``num_tokens``: median of three after one to warm up."""
    h = model.tok_embeddings(torch.arange(num_tokens).unsqueeze(0))  # [1, S, D]
    times = []
    for _ in range(4):
        start, states = time.perf_counter(), h
        for layer in model.layers:
            states = layer(states)
        times.append((time.perf_counter() - start) / num_tokens)
    return statistics.median(times[1:])
