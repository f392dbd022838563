"""Check what tokens write: joined they are the text, whatever the tokenizer does to a token alone."""

import pytest

from helpers.tiny import write_tokenizer
from torchtune_kd.evaluation.pieces import Pieces
from torchtune_kd.models.smollm2 import smollm2_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    return smollm2_tokenizer(tmp_path / "tokenizer.json")


class StrippingTokenizer:
    """Words with their space before them, which a sentence loses at its beginning, as SentencePiece's do."""

    words = ("<s>", " a", " to", " be")

    def encode(self, text, add_bos=True, add_eos=True):
        return [self.words.index(f" {word}") for word in text.split()]

    def decode(self, ids):
        return "".join(self.words[index] for index in ids if index).removeprefix(" ")


@pytest.mark.parametrize("text", ["plain", "two\nlines\r\n\tand  spaces ", "✓ café 🙂🙂 日本語", "a real � and ✓�"])
def test_pieces_joined_are_the_text(tokenizer, text):
    texts = Pieces(tokenizer).texts(tokenizer.encode(text, add_eos=False))
    assert "".join(texts) == text
    assert len(texts) == len(text.encode())  # of a tokenizer that has a token for every byte


def test_first_token_of_a_character_writes_it_and_the_others_nothing(tokenizer):
    assert Pieces(tokenizer).texts(tokenizer.encode("a✓🙂é", add_eos=False)) == [
        "a", "✓", "", "", "🙂", "", "", "", "é", "",
    ]  # fmt: skip


def test_bytes_that_end_with_the_text_are_shown_as_broken(tokenizer):
    ids = tokenizer.encode("b✓", add_eos=False)[:-1]
    assert Pieces(tokenizer).texts(ids) == ["b", "�", ""]


def test_special_and_missing_tokens_have_names(tokenizer):
    pieces = Pieces(tokenizer)
    assert pieces.piece(tokenizer.special_tokens["<|im_end|>"]) == "<|im_end|>"
    assert pieces.piece(5000) == "<id 5000>"  # a row of a padded table


def test_space_before_a_word_is_kept_where_a_sentence_would_lose_it():
    tokenizer = StrippingTokenizer()
    assert tokenizer.decode([2]) == "to"
    assert Pieces(tokenizer).texts([2, 3]) == [" to", " be"]
    assert Pieces(tokenizer).piece(0) == "<id 0>"
