"""Let models go on with the same prompts, in the time there is."""

from collections.abc import Mapping

from torchtune.modules import TransformerDecoder

from torchtune_kd.demo.budget import Deadline
from torchtune_kd.generation.engine import greedy
from torchtune_kd.models.smollm2 import SmolLM2Tokenizer


def completions(
    models: Mapping[str, TransformerDecoder],
    tokenizer: SmolLM2Tokenizer,
    prompts: Mapping[str, list[int]],
    most: int,
    deadline: Deadline,
    seconds: float,
) -> tuple[list[dict[str, str]], int]:
    """Let each model go on with each prompt; every text has its share of the seconds that are left.

    Args:
        models (Mapping[str, TransformerDecoder]): With caches of keys and values, by name.
        tokenizer (SmolLM2Tokenizer): Reads what they write.
        prompts (Mapping[str, list[int]]): Ids of each prompt.
        most (int): Tokens of a text.
        deadline (Deadline): Of the demo.
        seconds (float): For all texts.

    Returns:
        tuple[list[dict[str, str]], int]: For each prompt the prompt and the texts, by name, and how many of them ended
        before they had ``most`` tokens since their share was over.
    """
    end, texts = deadline.elapsed() + seconds, len(models) * len(prompts)
    written, cut = [], 0
    for prompt, ids in prompts.items():
        written.append({"prompt": prompt})
        for name, model in models.items():
            share = (end - deadline.elapsed()) / texts
            begin = deadline.elapsed()
            tokens = greedy(model, ids, most, tokenizer.stop_tokens, share)
            cut += len(tokens) < most and deadline.elapsed() - begin >= share
            texts -= 1
            written[-1][name] = tokenizer.decode(tokens)
    return written, cut
