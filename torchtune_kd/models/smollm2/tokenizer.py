"""The SmolLM2 tokenizer as a torchtune ``ModelTokenizer``, read from Hugging Face's ``tokenizer.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from torchtune.data import ChatMLTemplate, Message, PromptTemplate
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from torchtune_kd._torchtune import prompt_template as find_template

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TruncationType = Literal["left", "right"]


class SmolLM2Tokenizer(ModelTokenizer, Transform):
    """Byte-level BPE with single digits, and the ChatML layout of SmolLM2's own chat template.

    A conversation becomes, token for token, what the ``chat_template`` of the published model renders::

        <|im_start|>system
        {system prompt}<|im_end|>
        <|im_start|>user
        {question}<|im_end|>
        <|im_start|>assistant
        {answer}<|im_end|>

    with the template's default system prompt in front when the first message has another role. As in the
    template there is no beginning-of-sequence token, so ``bos_id`` is None and ``add_bos`` adds nothing. The
    role "ipython" is written "tool". Special tokens that stand in a text are read as special tokens, as
    Hugging Face's tokenizers and torchtune's Qwen tokenizers do: strip them from text that is not trusted.

    Args:
        path (str | Path): Path to ``tokenizer.json``, or to the folder that holds it.
        max_seq_len (int | None): Longest sequence that ``tokenize_messages`` returns. Default None: no limit.
        prompt_template (PromptTemplate | None): torchtune prompt template, applied to the messages before
            they are laid out. Its text is tokenized as normal text. Default None.
        truncation_type (str): Which side of a longer sequence is cut: "right" (default) or "left".

    Raises:
        ValueError: If the file is missing, lacks a ChatML token, or an argument is out of range.

    Example:
        >>> tokenizer = SmolLM2Tokenizer("SmolLM2-135M-Instruct/tokenizer.json")
        >>> tokenizer.encode("Hello world!", add_eos=False)
        [19556, 905, 17]
    """

    bos_id = None

    def __init__(
        self,
        path: str | Path,
        max_seq_len: int | None = None,
        prompt_template: PromptTemplate | None = None,
        truncation_type: TruncationType = "right",
    ) -> None:
        if truncation_type not in ("left", "right"):
            raise ValueError(f"Expected truncation_type 'left' or 'right', but got {truncation_type!r}; choose one.")
        if max_seq_len is not None and max_seq_len < 1:
            raise ValueError(f"Expected max_seq_len of at least 1 or None, but got {max_seq_len}; raise it.")
        if isinstance(prompt_template, ChatMLTemplate):
            raise ValueError(
                "Expected no ChatMLTemplate, because SmolLM2's tokenizer writes the ChatML tokens itself and "
                "they would stand twice; set prompt_template to null."
            )
        self._tokenizer = Tokenizer.from_file(str(_find_tokenizer_json(Path(path))))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in sorted(added.items()) if token.special}
        missing = [token for token in (ENDOFTEXT, IM_START, IM_END) if token not in self.special_tokens]
        if missing:
            raise ValueError(
                f"Expected the special tokens of SmolLM2, but {path} lacks {', '.join(missing)}; "
                "give the tokenizer.json of a SmolLM2 model."
            )
        self.im_start_id = self.special_tokens[IM_START]
        self.im_end_id = self.special_tokens[IM_END]
        self.eos_id = self.pad_id = self.im_end_id  # as in the tokenizer_config.json of the Instruct models
        self.stop_tokens = [self.im_end_id, self.special_tokens[ENDOFTEXT]]
        self.max_seq_len = max_seq_len
        self.prompt_template = prompt_template
        self.truncation_type = truncation_type

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def base_vocab_size(self) -> int:
        """Return the number of ids without the special tokens."""
        return self.vocab_size - len(self.special_tokens)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        Any text comes back from :meth:`decode` but for characters whose bytes the vocabulary lacks and which
        vanish, as in the published tokenizer: U+0004, 6, 13, 14, 16, 1D and U+40000 to BFFFF.

        Args:
            text (str): Text; special tokens in it become their ids.
            add_bos (bool): Adds nothing, since SmolLM2 has no such token; torchtune's datasets pass it.
            add_eos (bool): Append ``eos_id``. Default True.

        Returns:
            list[int]: Token ids.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: list[int], truncate_at_eos: bool = False, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            token_ids (list[int]): Token ids.
            truncate_at_eos (bool): Stop in front of the first ``eos_id``. Default False.
            skip_special_tokens (bool): Leave special tokens out. Default False.

        Returns:
            str: The text.
        """
        if truncate_at_eos and self.eos_id in token_ids:
            token_ids = token_ids[: token_ids.index(self.eos_id)]
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: list[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Lay a conversation out in ChatML.

        Every token of a message, its header and its end included, is masked as the message is; a default
        system prompt is masked. A sequence cut on the right ends with ``eos_id``, masked, because the text
        did not end there.

        Args:
            messages (list[Message]): The conversation; text content only.
            add_end_tokens (bool): Close the last message with ``<|im_end|>``. False leaves a last assistant
                message open, so that an empty one is the prompt for the model's answer. Default True.

        Returns:
            tuple[list[int], list[bool]]: Token ids, and for each whether the loss ignores it.

        Raises:
            ValueError: If there is no message or one holds something other than text.
        """
        if not messages:
            raise ValueError("Expected at least one message, but got none; remove empty conversations from the data.")
        if self.prompt_template is not None:
            messages = self.prompt_template(messages)
        if messages[0].role != "system":
            messages = [Message(role="system", content=DEFAULT_SYSTEM_PROMPT, masked=True), *messages]

        tokens: list[int] = []
        mask: list[bool] = []
        for position, message in enumerate(messages):
            is_open = not add_end_tokens and position == len(messages) - 1 and message.role == "assistant"
            ids = self._tokenize_message(message, closed=not is_open)
            tokens += ids
            mask += [message.masked] * len(ids)
        return self._truncate(tokens, mask, add_end_tokens)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Replace the field "messages" of a sample by "tokens" and "mask".

        Args:
            sample (Mapping[str, Any]): Sample with a list of messages in "messages".
            inference (bool): Leave a last assistant message open. Default False.

        Returns:
            Mapping[str, Any]: The sample.
        """
        messages = sample.pop("messages")
        sample["tokens"], sample["mask"] = self.tokenize_messages(messages, add_end_tokens=not inference)
        return sample

    def _tokenize_message(self, message: Message, closed: bool) -> list[int]:
        for item in message.content:
            if item["type"] != "text":
                raise ValueError(
                    f"Expected messages of text, but a {message.role} message holds {item['type']!r}; "
                    "SmolLM2 reads text only."
                )
        role = "tool" if message.role == "ipython" else message.role
        # header and content in one call: BPE may join the newline with whitespace that follows it
        text = f"{role}\n{message.text_content}"
        ids = [self.im_start_id, *self.encode(text, add_eos=False)]
        return [*ids, self.im_end_id, *self.encode("\n", add_eos=False)] if closed else ids

    def _truncate(self, tokens: list[int], mask: list[bool], add_eos: bool) -> tuple[list[int], list[bool]]:
        limit = self.max_seq_len
        if limit is None or len(tokens) <= limit:
            return tokens, mask
        if self.truncation_type == "left":
            return tokens[-limit:], mask[-limit:]
        tokens, mask = tokens[:limit], mask[:limit]
        if add_eos:
            tokens[-1], mask[-1] = self.eos_id, True
        return tokens, mask


def smollm2_tokenizer(
    path: str | Path,
    max_seq_len: int | None = None,
    prompt_template: str | dict[str, Any] | None = None,
    truncation_type: TruncationType = "right",
) -> SmolLM2Tokenizer:
    """Build the SmolLM2 tokenizer, as torchtune's configs name it.

    Args:
        path (str | Path): Path to ``tokenizer.json``, or to the folder that holds it.
        max_seq_len (int | None): Longest sequence; longer ones are cut. Default None: no limit.
        prompt_template (str | dict | None): Dotpath of a prompt template, or a mapping of roles to pairs of
            texts in front of and behind a message. Default None.
        truncation_type (str): Which side of a longer sequence is cut: "right" (default) or "left".

    Returns:
        SmolLM2Tokenizer: The tokenizer.
    """
    return SmolLM2Tokenizer(path, max_seq_len, find_template(prompt_template), truncation_type)


def _find_tokenizer_json(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"Expected a tokenizer.json, but {file} does not exist; check the tokenizer's path.")
    return file
