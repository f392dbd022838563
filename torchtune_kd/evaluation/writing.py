"""Text from a candidate, until it says one of some words.

Shapes: V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torchtune.modules import local_kv_cache

from torchtune_kd.evaluation.candidates import Candidate


@torch.inference_mode()
def write_until(candidate: Candidate, tokenizer: Any, context: str, until: Sequence[str], num_tokens: int) -> str:
    """Continue a text with the most likely token, again and again.

    Args:
        candidate (Candidate): the model.
        tokenizer (Any): torchtune's.
        context (str): what the model reads; cut from the left where it does not fit with what is to be written.
        until (Sequence[str]): texts that end the answer and are not part of it.
        num_tokens (int): tokens to write, at most.

    Returns:
        str: the answer.
    """
    ids = tokenizer.encode(context, add_bos=True, add_eos=False)[-max(candidate.max_seq_len - num_tokens, 1) :]
    length = min(len(ids) + num_tokens, candidate.max_seq_len)
    causal = torch.ones(length, length, dtype=torch.bool, device=candidate.device).tril()
    step, position, written = torch.tensor([ids], device=candidate.device), 0, []
    dtype = next(candidate.decoder.parameters()).dtype
    with local_kv_cache(
        candidate.decoder, batch_size=1, device=candidate.device, dtype=dtype, decoder_max_seq_len=length
    ):
        while position + step.shape[1] <= length:
            places = torch.arange(position, position + step.shape[1], device=candidate.device)
            states = candidate.decoder(step, mask=causal[places].unsqueeze(0), input_pos=places.unsqueeze(0))
            token = int(F.linear(states[0, -1], *candidate.head).argmax())
            written.append(token)
            text = tokenizer.decode(written)
            stops = [text.index(stop) for stop in until if stop and stop in text]
            if stops:
                return text[: min(stops)]
            if token in tokenizer.stop_tokens:
                return tokenizer.decode(written[:-1])
            if len(written) == num_tokens:
                break
            position += step.shape[1]
            step = torch.tensor([[token]], device=candidate.device)
    return tokenizer.decode(written)
