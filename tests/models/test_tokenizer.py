"""The real SmolLM2 tokenizer against its own chat template and torchtune's datasets."""

import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torchtune.data import Message
from torchtune.datasets import alpaca_dataset, chat_dataset, text_completion_dataset

from helpers.assets import reference_text
from torchtune_kd.models.smollm2 import SmolLM2Tokenizer, smollm2_tokenizer
from torchtune_kd.models.smollm2.tokenizer import DEFAULT_SYSTEM_PROMPT

CONVERSATION = [
    ("user", "What is 12 * 345?"),
    ("assistant", "\n\n  It is 4140.\n"),  # whitespace that BPE would join with the header's newline
    ("user", "Sûr? 你好 👩‍💻"),
    ("assistant", "Yes."),
]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> SmolLM2Tokenizer:
    return smollm2_tokenizer(smollm2)


@pytest.fixture(scope="module")
def render(smollm2: Path):
    template = json.loads((smollm2 / "tokenizer_config.json").read_text())["chat_template"]
    ids_of = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))

    def render(turns: list[tuple[str, str]], add_generation_prompt: bool = False) -> list[int]:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = jinja2.Template(template).render(messages=messages, add_generation_prompt=add_generation_prompt)
        return ids_of.encode(text).ids

    return render


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    return [Message(role=role, content=content, masked=role != "assistant") for role, content in turns]


def test_known_ids_and_sizes(tokenizer: SmolLM2Tokenizer) -> None:
    assert tokenizer.encode("Hello world!", add_eos=False) == [19556, 905, 17]
    assert tokenizer.encode("Hello world!") == [19556, 905, 17, 2]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (2, 2, None)
    assert (tokenizer.vocab_size, tokenizer.base_vocab_size) == (49152, 49152 - 17)
    assert tokenizer.stop_tokens == [2, 0]
    digits = tokenizer.encode("2025", add_eos=False)
    assert [tokenizer.decode([index]) for index in digits] == ["2", "0", "2", "5"]


# the published vocabulary lacks six control characters and the bytes that begin U+40000 to U+BFFFF
ENCODABLE = st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")


@settings(max_examples=200, deadline=None)
@given(text=st.text(ENCODABLE))
def test_decode_returns_the_text(tokenizer: SmolLM2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_eos=False)) == text


def test_decode_options(tokenizer: SmolLM2Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>one<|im_end|>two", add_eos=False)
    assert tokenizer.decode(ids) == "<|im_start|>one<|im_end|>two"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "onetwo"
    assert tokenizer.decode(ids, truncate_at_eos=True) == "<|im_start|>one"


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("length", range(1, 5))
def test_messages_equal_the_chat_template(tokenizer, render, system: str | None, length: int) -> None:
    turns = ([("system", system)] if system else []) + CONVERSATION[:length]
    tokens, mask = tokenizer.tokenize_messages(_messages(turns))
    assert tokens == render(turns)
    assert len(mask) == len(tokens)


def test_an_open_empty_answer_is_the_generation_prompt(tokenizer, render) -> None:
    turns = CONVERSATION[:3]
    sample = {"messages": _messages([*turns, ("assistant", "")]), "id": 7}
    sample = tokenizer(sample, inference=True)
    assert sample["tokens"] == render(turns, add_generation_prompt=True)
    assert sample["id"] == 7
    assert "messages" not in sample


def test_tool_results_use_the_role_tool(tokenizer, render) -> None:
    tokens, _ = tokenizer.tokenize_messages([Message(role="ipython", content="42")])
    assert tokens == render([("tool", "42")])


def test_mask_leaves_exactly_the_answers(tokenizer: SmolLM2Tokenizer) -> None:
    tokens, mask = tokenizer.tokenize_messages(_messages(CONVERSATION))
    text = tokenizer.decode([token for token, masked in zip(tokens, mask, strict=True) if not masked])
    answers = [content for role, content in CONVERSATION if role == "assistant"]
    assert text == "".join(f"<|im_start|>assistant\n{answer}<|im_end|>\n" for answer in answers)


def test_truncation(smollm2: Path, tokenizer: SmolLM2Tokenizer) -> None:
    messages = _messages(CONVERSATION)
    tokens, mask = tokenizer.tokenize_messages(messages)
    full = len(tokens)

    right = smollm2_tokenizer(smollm2, max_seq_len=full - 6)
    assert right.tokenize_messages(messages) == (
        [*tokens[: full - 7], right.eos_id],
        [*mask[: full - 7], True],
    )
    # without end tokens nothing is put in the place of what was cut
    assert right.tokenize_messages(messages, add_end_tokens=False)[0] == tokens[: full - 6]
    left = smollm2_tokenizer(smollm2, max_seq_len=full - 6, truncation_type="left")
    assert left.tokenize_messages(messages) == (tokens[6:], mask[6:])
    exact = smollm2_tokenizer(smollm2, max_seq_len=full)
    assert exact.tokenize_messages(messages) == (tokens, mask)


def test_prompt_template(smollm2: Path, render) -> None:
    templated = smollm2_tokenizer(smollm2, prompt_template={"user": ("Q: ", " A:")})
    tokens, _ = templated.tokenize_messages(_messages([("user", "why?")]))
    assert tokens == render([("user", "Q: why? A:")])


def test_bad_input(smollm2: Path, tokenizer: SmolLM2Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'left' or 'right', but got 'middle'"):
        smollm2_tokenizer(smollm2, truncation_type="middle")
    with pytest.raises(ValueError, match="max_seq_len of at least 1 or None, but got 0"):
        smollm2_tokenizer(smollm2, max_seq_len=0)
    with pytest.raises(ValueError, match="no ChatMLTemplate"):
        smollm2_tokenizer(smollm2, prompt_template="torchtune.data.ChatMLTemplate")
    with pytest.raises(ValueError, match=r"tokenizer.json does not exist"):
        smollm2_tokenizer(tmp_path)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"lacks <\|endoftext\|>, <\|im_start\|>, <\|im_end\|>"):
        smollm2_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least one message"):
        tokenizer.tokenize_messages([])
    with pytest.raises(ValueError, match="user message holds 'image'"):
        tokenizer.tokenize_messages([Message(role="user", content=[{"type": "image", "content": "unused"}])])


def test_text_completion_packed(smollm2: Path, tmp_path: Path) -> None:
    documents = reference_text()[:6000].split("\n\n")
    source = tmp_path / "data.json"
    source.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    tokenizer = smollm2_tokenizer(smollm2, max_seq_len=64)
    dataset = text_completion_dataset(tokenizer, "json", data_files=str(source), packed=True, cache_dir=str(tmp_path))
    first = tokenizer.encode(documents[0])
    assert dataset[0]["tokens"][: len(first)].tolist() == first[:63]
    assert all(len(pack["tokens"]) == 64 for pack in dataset)


def test_alpaca_dataset(smollm2: Path, tmp_path: Path) -> None:
    source = tmp_path / "data.json"
    source.write_text(json.dumps([{"instruction": "Add 1 and 1.", "input": "", "output": "2"}]))
    tokenizer = smollm2_tokenizer(smollm2, max_seq_len=256)
    sample = alpaca_dataset(
        tokenizer, source="json", data_files=str(source), train_on_input=False, cache_dir=str(tmp_path)
    )[0]
    assert tokenizer.decode(sample["tokens"]).startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>")
    kept = [label for label in sample["labels"] if label != -100]
    assert tokenizer.decode(kept) == "<|im_start|>assistant\n2<|im_end|>\n"


def test_chat_dataset(smollm2: Path, tmp_path: Path, render) -> None:
    source = tmp_path / "data.json"
    turns = [{"role": role, "content": content} for role, content in CONVERSATION]
    source.write_text(json.dumps([{"messages": turns}]))
    sample = chat_dataset(
        smollm2_tokenizer(smollm2),
        source="json",
        conversation_column="messages",
        conversation_style="openai",
        data_files=str(source),
        split="train",
        cache_dir=str(tmp_path),
    )[0]
    assert sample["tokens"] == render(CONVERSATION)
