"""Conversations as the config's tokenizer lays them out, and token strings as its ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torchtune.data import Message

from torchtune_kd.errors import UserError, first_line

_ROLES = {"tool": "ipython", "developer": "system", "human": "user", "gpt": "assistant"}
TOKEN_ID = "token_id:"  # what vLLM writes in place of a token's text with --return-tokens-as-token-ids


def conversation(tokenizer: Any, messages: Sequence[Any], where: str) -> np.ndarray:
    """Return the ids [L] of messages with ``role`` and ``content``.

    Raises:
        UserError: for messages that have none, or that the tokenizer cannot lay out.
    """
    try:
        laid_out = [
            Message(role=_ROLES.get(each["role"], each["role"]), content=each["content"], masked=False)
            for each in messages
        ]
        return np.array(tokenizer.tokenize_messages(laid_out)[0], dtype=np.int64)
    except Exception as error:  # whatever templates and tokenizers raise
        raise UserError(
            f"Expected messages with `role` and `content`, but those of {where} cannot be tokenised "
            f"({type(error).__name__}: {first_line(error)}): correct that row, or leave it out."
        ) from error


class TokenIds:
    """Find the id of a token's text.

    Args:
        tokenizer (Any): torchtune's.
        vocab (int): ids of the models.
    """

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self._tokenizer = tokenizer
        special = getattr(tokenizer, "special_tokens", None)
        self._special: Mapping[str, int] = special if isinstance(special, Mapping) else {}
        self._vocab = min(vocab, getattr(tokenizer, "vocab_size", vocab))
        self._ids: dict[str, list[int]] = {}

    def find(self, entry: Mapping[str, Any], where: str) -> int | None:
        """Return the one id that a ``token`` with its ``bytes`` is; None for several, or none.

        Raises:
            UserError: for an entry without a token.
        """
        token, raw = entry.get("token"), entry.get("bytes")
        if not isinstance(token, str):
            raise UserError(
                f"Expected a `token` with its log-probability, but {where} has {str(entry)[:80]}: correct it."
            )
        if token.startswith(TOKEN_ID) and token[len(TOKEN_ID) :].isdecimal():
            return int(token[len(TOKEN_ID) :])
        if token in self._special:
            return self._special[token]
        if isinstance(raw, list):
            try:
                token = bytes(raw).decode("utf-8")
            except (ValueError, TypeError):  # a part of a character
                return None
        found = (self._ids or self._read()).get(token, [])
        return found[0] if len(found) == 1 else None

    def _read(self) -> dict[str, list[int]]:
        """Read the text of every id."""
        special = set(self._special.values())
        for index in range(self._vocab):
            if index in special:
                continue
            try:
                text = self._tokenizer.decode([index])
            except Exception:  # an id that is no token
                continue
            self._ids.setdefault(text, []).append(index)
        return self._ids
