"""Load a model of the demo, let it write, and time it. Batch size is 1 throughout."""

import math
import time
from collections.abc import Sequence

import torch
from torchtune.modules import TransformerDecoder


@torch.inference_mode()
def greedy(
    model: TransformerDecoder,
    prompt: Sequence[int],
    num_tokens: int,
    stop_tokens: Sequence[int] = (),
    seconds: float = math.inf,
) -> list[int]:
    """Continue a prompt with the most likely token, again and again, with key-value caches.

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
