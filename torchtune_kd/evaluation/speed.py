"""How fast models write, and how large they are."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchtune.modules import TransformerDecoder

from torchtune_kd.generation.engine import greedy


def num_parameters(model: TransformerDecoder) -> int:
    """Count the weights of the model, the tied embedding once."""
    return sum(parameter.numel() for parameter in model.parameters())


class Speeds(NamedTuple):
    """Hold what :func:`tokens_per_second` measured."""

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
