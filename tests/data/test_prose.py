"""What is trained on and what is judged by: no overlap, nothing lost, the same every time."""

import itertools
import json

import pytest

from torchtune_kd.data import prose
from torchtune_kd.errors import UserError
from torchtune_kd.models.smollm2 import smollm2_tokenizer


def paragraphs(documents):
    """Paragraphs long enough to be more than a phrase, whatever their line breaks and indentation."""
    found = (" ".join(p.split()) for content in documents.values() for p in content.split("\n\n"))
    return {p for p in found if len(p) >= 40}


def n_grams(content, n=13):
    words = content.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.fixture(scope="module")
def reference():
    return prose.split_documents(prose.reference_documents())


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2_tokenizer(smollm2)


def test_the_reference_text_repeats_itself_and_the_split_does_not(reference):
    whole = prose.reference_documents()
    assert "if" in whole and whole["if"].split("\n\n")[1] in whole["compound"]  # why a split by document is not enough
    assert not paragraphs(reference.train) & paragraphs(reference.held_out)
    held_out, train = n_grams(prose.joined(reference.held_out)), n_grams(prose.joined(reference.train))
    assert len(held_out & train) < 0.01 * len(held_out)


def test_a_twentieth_of_the_text_is_held_out_in_many_documents(reference):
    sizes = [sum(map(len, part.values())) for part in (reference.train, reference.held_out)]
    assert 0.03 < sizes[1] / sum(sizes) <= 0.05
    assert len(reference.held_out) >= 10
    assert max(map(len, reference.held_out.values())) < sizes[1] / 2


def test_the_split_follows_from_the_texts_alone():
    documents = prose.reference_documents()
    backwards = dict(reversed(documents.items()))
    assert prose.split_documents(backwards) == prose.split_documents(documents)


def test_repeats_go_and_phrases_stay():
    section = "This sentence stands in two documents, word for word, and has more than forty characters."
    own = "But this one is the short document's own, and it has more than forty characters as well, many more."
    documents = {
        "long": f"Long\n\n{section}\n\nNote:\n\n" + "Another paragraph, as long as it needs to be." * 9,
        "short": f"Short\n\n   {section.replace(' ', chr(10), 1)}\n\nNote:\n\n{own}",  # wrapped and indented otherwise
        "part": f"Part\n\n{section}",
    }
    kept = prose.without_repeats(documents)
    assert set(kept) == {"long", "short"}
    assert kept["long"] == documents["long"]
    assert kept["short"] == f"Short\n\nNote:\n\n{own}"


@pytest.mark.parametrize("first", [None, 7])
def test_passages_are_the_text_and_its_tokens(reference, tokenizer, first):
    content = prose.joined(reference.held_out)
    rows = prose.passages(tokenizer, content, 64, first)
    assert "".join(rows) == content
    tokens = [tokenizer.encode(row, add_eos=False) for row in rows]
    assert list(itertools.chain(*tokens)) == tokenizer.encode(content, add_eos=False)
    limits = [first or 64, *[64] * (len(rows) - 1)]
    assert all(len(row) <= limit for row, limit in zip(tokens, limits, strict=True))
    assert sum(map(len, tokens)) > 0.95 * sum(limits) - 64  # the rows are full


def test_a_word_longer_than_a_passage_is_a_passage(tokenizer):
    rows = prose.passages(tokenizer, f"one {'x1' * 50} two", 8)
    assert [row.strip()[:4] for row in rows] == ["one", "x1x1", "two"]


def test_training_passages_repeat_no_cut(reference, tokenizer):
    documents = {"raise": reference.train["raise"]}
    one_pass = len(prose.passages(tokenizer, prose.joined(documents), 64))
    rows = prose.training_passages(tokenizer, documents, 64, 3 * one_pass)
    assert len(rows) == 3 * one_pass == len(set(rows))
    assert rows == prose.training_passages(tokenizer, documents, 64, 3 * one_pass)
    assert rows[:2] == prose.training_passages(tokenizer, documents, 64, 2)
    assert set("".join(rows[:one_pass])) == set(prose.joined(documents))


def test_repeated_passages_are_the_same_in_every_pass(reference, tokenizer):
    documents = {"raise": reference.train["raise"]}
    one_pass = prose.passages(tokenizer, prose.joined(documents), 64)
    size = len(one_pass)
    rows = prose.repeated_passages(one_pass, 2 * size + 1, size)
    assert len(rows) == 2 * size + 1 and set(rows[:size]) == set(rows[size:-1]) == set(one_pass)
    assert rows[:size] != rows[size:-1]
    few = prose.repeated_passages(one_pass, 9, different=4)
    assert len(few) == 9 and set(few[:4]) == set(few[4:8]) == set(few) < set(one_pass)


def test_a_file_is_cut_at_blank_lines(tmp_path):
    file = tmp_path / "own.txt"
    parts = [f"Paragraph {i}. " + f"word{i} " * 60 for i in range(300)]
    file.write_text("\n\n".join(parts))
    documents = prose.read_documents(file)
    assert 50 <= len(documents) <= 110
    assert [p.strip() for content in documents.values() for p in content.split("\n\n")] == [p.strip() for p in parts]
    split = prose.split_documents(documents)
    assert sorted(split.train.keys() | split.held_out.keys()) == sorted(documents)


@pytest.mark.parametrize("content", [b"", b"A few words.", b"\xff\xfe\xfa", None])
def test_unusable_text_is_one_sentence(tmp_path, content):
    file = tmp_path / "own.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"--text") as error:
        prose.split_documents(prose.read_documents(file))
    assert "\n" not in str(error.value)


def test_rows_are_written_as_the_dataset_reads_them(tmp_path):
    rows = ["plain", "two\nlines", 'a "quote" and €']
    prose.write_rows(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": row} for row in rows]
