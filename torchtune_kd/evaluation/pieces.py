"""Tell what a token writes, for any tokenizer of torchtune."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders write for bytes that are no character


class Pieces:
    """The texts of a tokenizer's ids.

    Every id is decoded behind a letter: alone it would lose the space that it begins with in some tokenizers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = getattr(tokenizer, "vocab_size", None)  # torchtune's tokenizer of Hugging Face files has none
        self._special = {index: name for name, index in (getattr(tokenizer, "special_tokens", None) or {}).items()}
        self._letter = tokenizer.encode("a", add_bos=False, add_eos=False)[-1:]
        self._before = tokenizer.decode(list(self._letter))

    def piece(self, index: int) -> str:
        """Return what an id writes; with U+FFFD where that is no whole character, ``<id 7>`` where it is nothing."""
        named = self._special.get(index)
        if named is not None:
            return named
        is_token = self._size is None or index < self._size  # tables of weights are padded beyond the vocabulary
        return (is_token and self._decoded([index])) or f"<id {index}>"

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Return what each token of a text writes.

        The first of several tokens that write a character together gets all of it, the others get an empty text.
        """
        texts = [self.piece(index) for index in ids]
        begin = 0
        while begin < len(ids):
            end = begin + 1
            if BROKEN in texts[begin]:
                while end < len(ids) and BROKEN in texts[end] and BROKEN in self._decoded(ids[begin:end]):
                    end += 1
                texts[begin:end] = [self._decoded(ids[begin:end]), *[""] * (end - begin - 1)]
            begin = end
        return texts

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._letter, *ids]).removeprefix(self._before)
