"""Import what APIs say of the answers alone: OpenAI's chat completions, and axolotl's rows."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.cached import cached, documents_of
from helpers.foreign import (
    answers_section,
    imported,
    listed,
    run_config,
    said_by_the_teacher,
    vllm_rows,
    write_lines,
)
from helpers.tiny import read_log, run_in_process
from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.models.smollm2 import smollm2_tokenizer
from torchtune_kd.tools.importing.axolotl import read_axolotl
from torchtune_kd.tools.importing.messages import TokenIds, conversation

K = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents whose first three tokens are a prompt, as the config's data and as vLLM would list them."""
    folder = tmp_path_factory.mktemp("answers")
    said = [each for each in said_by_the_teacher(run_config(folder)) if len(each.tokens) > 5]
    rows = [{"tokens": each.tokens, "answer": [3, len(each.tokens)]} for each in said]
    write_lines(folder / "answers.jsonl", rows)
    write_lines(folder / "vllm.jsonl", vllm_rows(said, K))
    cfg = config(folder, folder)
    imported(cfg, "vllm", folder / "vllm.jsonl", folder / "cache")
    return folder


def config(folder, out, **more):
    cfg = run_config(folder, out, **more)
    cfg.dataset = answers_section(folder / "answers.jsonl")
    cfg.dataset_val = None
    return cfg


@pytest.fixture(scope="module")
def said(folder):
    return [each for each in said_by_the_teacher(run_config(folder)) if len(each.tokens) > 5]


def completion(each, spell=lambda index: {"token": f"token_id:{index}"}):
    """A server's response to the first three tokens, and its prompt's ids."""
    content = []
    for at in range(2, len(each.tokens) - 1):
        top = [spell(index) | {"logprob": value} for index, value in listed(each, at, K).items()]
        drawn = each.tokens[at + 1]
        own = spell(drawn) | {"logprob": listed(each, at, K)[drawn]}
        content.append(own | {"top_logprobs": top})
    return {"prompt_token_ids": each.tokens[:3], "choices": [{"logprobs": {"content": content}}]}


@pytest.mark.heavy
def test_completions_train(folder, tmp_path, said, capsys):
    source = write_lines(tmp_path / "rows.jsonl", [completion(each) for each in said])
    cfg = config(folder, tmp_path / "out")
    cache = imported(cfg, "openai", source, tmp_path / "cache")
    assert f"{len(said)} of the {len(said)} rows of `dataset`" in capsys.readouterr().out
    assert documents_of(cache) == documents_of(folder / "cache")
    run_in_process(cached(cfg, cache))
    assert read_log(cfg.output_dir)[-1]["loss"] > 0


def test_a_token_is_found_by_its_text(folder):
    tokenizer = smollm2_tokenizer(folder / "student")
    find = TokenIds(tokenizer, 384).find
    (x,) = tokenizer.encode("x", add_eos=False)
    assert find({"token": "x", "bytes": [120]}, "") == find({"token": "x"}, "") == x
    assert find({"token": "?", "bytes": [120]}, "") == x
    assert find({"token": "<|im_end|>", "bytes": None}, "") == tokenizer.special_tokens["<|im_end|>"]
    assert find({"token": "token_id:300"}, "") == 300
    assert find({"token": "\\xc3", "bytes": [0xC3]}, "") is None  # a part of a character
    assert find({"token": "xy"}, "") is None and find({"token": "\ufffd"}, "") is None


def test_answers_in_a_conversation(folder, tmp_path, said):
    """Text of the API, laid out by the config's tokenizer; what is no text of one id counts to the rest if asked."""
    tokenizer = smollm2_tokenizer(folder / "student")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    tokens = conversation(tokenizer, [*messages, {"role": "assistant", "content": "yes"}], "").tolist()
    end = len(tokens) - 2  # in front of <|im_end|> and a line break
    assert tokenizer.decode(tokens[end - 3 : end]) == "yes"
    write_lines(tmp_path / "answers.jsonl", [{"tokens": tokens, "answer": [end - 3, end]}])
    cfg = config(folder, tmp_path)
    cfg.dataset = answers_section(tmp_path / "answers.jsonl")
    content = [
        {"token": letter, "logprob": -1.0, "bytes": [ord(letter)], "top_logprobs": [{"token": "b", "logprob": -0.9}]}
        for letter in "yes"
    ]
    row = {"messages": messages, "choices": [{"message": {"content": "yes"}, "logprobs": {"content": content}}]}
    cache = imported(cfg, "openai", write_lines(tmp_path / "rows.jsonl", [row]), tmp_path / "cache")
    manifest = CacheManifest.read(cache)
    assert (manifest.tokens, manifest.k, manifest.temperatures) == (3, 1, [1.0])
    content[1]["top_logprobs"].append({"token": "\\xc3", "bytes": [0xC3], "logprob": -3.0})
    source = write_lines(tmp_path / "more.jsonl", [row])
    with pytest.raises(SystemExit):
        imported(cfg, "openai", source, tmp_path / "more")
    imported(cfg, "openai", source, tmp_path / "more", "--ambiguous-to-rest")
    assert documents_of(tmp_path / "more") == documents_of(cache)


def structured(each, begin=3):
    """Entries of vLLM with ids as text, of the tokens from ``begin`` on."""
    return [
        [{"token": f"token_id:{index}", "logprob": value} for index, value in listed(each, at, K).items()]
        for at in range(begin - 1, len(each.tokens) - 1)
    ]


def two_columns(each, begin=3):
    entries = [listed(each, at, K) for at in range(begin - 1, len(each.tokens) - 1)]
    return {
        "input_ids": each.tokens,
        "logprobs": [list(entry.values()) for entry in entries],
        "target_token_ids": [list(entry) for entry in entries],
    }


@pytest.mark.parametrize("kind", ["structured", "two columns", "all tokens", "None first", "Parquet"])
def test_rows_of_axolotl(folder, tmp_path, said, kind):
    rows = [{"input_ids": each.tokens, "logprobs": structured(each)} for each in said]
    if kind == "two columns":
        rows = [two_columns(each) for each in said]
    elif kind in ("all tokens", "None first"):
        none = [None] if kind == "None first" else []
        rows = [{"input_ids": each.tokens, "logprobs": none + structured(each, 1)} for each in said]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    if kind == "Parquet":
        source = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    cache = imported(config(folder, tmp_path), "axolotl", source, tmp_path / "cache")
    assert documents_of(cache) == documents_of(folder / "cache")


@pytest.mark.parametrize("first", [0, 1], ids=["of axolotl 0.18", "of later ones"])
def test_rows_that_axolotl_prepared(folder, tmp_path, said, first):
    """Normalised over the stored ids, for every token of the document, from its own or from the next one on."""
    rows = []
    for each in said:
        own = two_columns(each, 1)
        values = [torch.tensor(row).log_softmax(-1).tolist() for row in own["logprobs"]]
        padding, ids = [[float("-inf")] * 3], own["target_token_ids"]
        rows.append(
            {
                "input_ids": each.tokens,
                "target_logprobs": values + padding if first else padding + values,
                "target_token_ids": [*ids, [0, 1, 2]] if first else [[0, 1, 2], *ids],
            }
        )
    source = write_lines(tmp_path / "rows.jsonl", rows)
    cache = imported(config(folder, tmp_path), "axolotl", source, tmp_path / "cache")
    manifest = CacheManifest.read(cache)
    assert manifest.temperatures == [] and manifest.tokens == CacheManifest.read(folder / "cache").tokens


def test_all_rows_of_axolotl_decide_which_tokens_are_meant(tmp_path):
    """By itself the second row would be taken to speak of its first token, which is the likelier one."""
    rows = [([1, 2, 3, 4, 5, 6, 7], [{4: -0.1}, {5: -0.2}, {6: -0.3}, {7: -0.1}]), ([8, 8, 8, 9], [{8: -0.1, 9: -2.5}])]
    source = write_lines(
        tmp_path / "rows.jsonl",
        [
            {
                "input_ids": tokens,
                "logprobs": [[{"token": f"token_id:{i}", "logprob": x} for i, x in each.items()] for each in listed],
            }
            for tokens, listed in rows
        ],
    )
    first, second = read_axolotl(source, None)
    assert first.positions.tolist() == [2, 3, 4, 5]
    assert second.positions.tolist() == [2]


def test_conversations_of_axolotl(folder, tmp_path):
    """Behind the answer stands what the template puts there, of which nothing is said."""
    tokenizer = smollm2_tokenizer(folder / "student")
    messages = [
        {"role": role, "content": text} for role, text in (("system", "s"), ("user", "?"), ("assistant", "yes"))
    ]
    tokens = conversation(tokenizer, messages, "").tolist()
    end = len(tokens) - 1  # the line break behind <|im_end|> is not generated
    write_lines(tmp_path / "answers.jsonl", [{"tokens": tokens, "answer": [end - 4, end]}])
    entries = [
        [{"token": f"token_id:{tokens[at]}", "logprob": -0.5}, {"token": "token_id:9", "logprob": -2.0}]
        for at in range(end - 4, end)
    ]
    source = write_lines(tmp_path / "rows.jsonl", [{"turns": messages, "said": entries}])
    cfg = config(folder, tmp_path)
    cfg.dataset = answers_section(tmp_path / "answers.jsonl")
    options = ("--messages-field", "turns", "--logprobs-field", "said")
    cache = imported(cfg, "axolotl", source, tmp_path / "cache", *options)
    assert CacheManifest.read(cache).tokens == 4


@pytest.mark.parametrize(
    "format, change, sentence",
    [
        ("openai", lambda row: row.pop("choices"), "under `choices`, but line 1 of .* has none but prompt_token_ids"),
        ("openai", lambda row: row.update(choices=[]), "an answer under `choices`"),
        ("openai", lambda row: row.pop("prompt_token_ids"), r"under `messages`, but line 1 .* has none but choices"),
        ("openai", lambda row: row["choices"][0].pop("logprobs"), "with `logprobs: true` and `top_logprobs: 20`"),
        ("openai", lambda row: content(row).update(token="xy"), "'xy' at line 1 of .* is that of several or none"),
        ("openai", lambda row: content(row).pop("token"), "Expected a `token` with its log-probability"),
        ("openai", lambda row: content(row)["top_logprobs"][0].pop("logprob"), "a number under `logprob`, .* None"),
        (
            "openai",
            lambda row: row.update(prompt_token_ids=None, messages=[{"role": "user", "content": "hi"}]),
            "gives the text of line 1 of .* other ids than the API",
        ),
        (
            "openai",
            lambda row: row.update(prompt_token_ids=None, messages=["hi"]),
            "those of line 1 of .* cannot be tokenised",
        ),
        ("axolotl", lambda row: row.pop("logprobs"), "under `logprobs`, but line 1 of .* has none but"),
        ("axolotl", lambda row: row.pop("input_ids"), "under `messages`, but line 1 of .* has none but"),
        ("axolotl", lambda row: row["logprobs"].__setitem__(0, [{"token": "a"}]), "those of line 1 of .* are other"),
        ("axolotl", lambda row: row.update(target_token_ids=[[1]]), r"has 1 and \d+: write that row again"),
        ("axolotl", lambda row: row.update(logprobs=[None]), "Expected log-probabilities, but line 1 of .* has none"),
        (
            "axolotl",
            lambda row: row.update(logprobs=[[{"token": "token_id:383", "logprob": -1.0}]] * 3),
            "at line 1 of .* they are not",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder, tmp_path, capsys, said, format, change, sentence):
    row = completion(said[0]) if format == "openai" else {"input_ids": said[0].tokens, "logprobs": structured(said[0])}
    row = json.loads(json.dumps(row))
    change(row)
    with pytest.raises(SystemExit) as ended:
        imported(config(folder, tmp_path), format, write_lines(tmp_path / "rows.jsonl", [row]), tmp_path / "cache")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(sentence, error), error


def content(row):
    return row["choices"][0]["logprobs"]["content"][0]
