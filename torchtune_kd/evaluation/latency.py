"""Time a model reading a prompt and writing each token.

Shapes: B batch, P tokens of the prompt, V vocabulary.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.modules import local_kv_cache

from torchtune_kd.evaluation.candidates import Candidate
from torchtune_kd.evaluation.measured import Measured


@dataclass(frozen=True)
class LatencySettings:
    """Say what is timed.

    Attributes:
        prompt_tokens (int): ids of the prompt, which are random: what they are changes no time.
        new_tokens (int): tokens written behind it, one at a time.
        batch_sizes (tuple[int, ...]): sequences at once.
        repeats (int): rounds after one to warm up.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 5


@torch.inference_mode()
def measure_latency(candidate: Candidate, batch_size: int, settings: LatencySettings) -> list[Measured]:
    """Time prefill and decoding with key-value caches, the most likely token each time.

    Returns:
        list[Measured]: median and 90th percentile of the prefill over the repeats and of a token over all tokens,
        tokens per second of the whole batch while decoding, and on CUDA the peak memory.
    """
    device, dtype = candidate.device, next(candidate.decoder.parameters()).dtype
    length = settings.prompt_tokens + settings.new_tokens
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(candidate.vocab_size, (batch_size, settings.prompt_tokens), generator=generator).to(device)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    prefill, decode = [], []
    others = 0  # bytes of what is on the device beside the candidate, such as the reference
    if device.type == "cuda":
        own = sum(weight.numel() * weight.element_size() for weight in candidate.decoder.parameters())
        others = torch.cuda.memory_allocated(device) - own
        torch.cuda.reset_peak_memory_stats(device)
    with local_kv_cache(
        candidate.decoder, batch_size=batch_size, device=device, dtype=dtype, decoder_max_seq_len=length
    ):
        for repeat in range(settings.repeats + 1):
            candidate.decoder.reset_caches()
            step, position = prompt, 0
            for number in range(settings.new_tokens + 1):
                began = _now(device)
                step = _next(candidate, step, position, causal)
                position = settings.prompt_tokens + number
                if repeat:
                    (decode if number else prefill).append(_now(device) - began)
    measured = [
        Measured("prefill_seconds_p50", float(np.percentile(prefill, 50)), None, len(prefill)),
        Measured("prefill_seconds_p90", float(np.percentile(prefill, 90)), None, len(prefill)),
        Measured("decode_seconds_p50", float(np.percentile(decode, 50)), None, len(decode)),
        Measured("decode_seconds_p90", float(np.percentile(decode, 90)), None, len(decode)),
        Measured("tokens_per_second", batch_size / float(np.median(decode)), None, len(decode)),
    ]
    if device.type == "cuda":
        measured.append(Measured("peak_bytes", torch.cuda.max_memory_allocated(device) - others))
    return measured


def _next(candidate: Candidate, step: Tensor, position: int, causal: Tensor) -> Tensor:
    """Return the most likely token [B, 1] after the tokens of ``step``, the first of which is at ``position``."""
    places = torch.arange(position, position + step.shape[1], device=step.device)
    mask = causal[places].expand(step.shape[0], -1, -1)
    states = candidate.decoder(step, mask=mask, input_pos=places.expand(step.shape[0], -1))
    return F.linear(states[:, -1:], *candidate.head).argmax(-1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
