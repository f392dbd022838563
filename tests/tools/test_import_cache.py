"""Other projects' signals as caches: they train as our own does, and what does not fit is refused."""

import json
import re

import pytest
from omegaconf import OmegaConf

from helpers.cached import cached, documents_of, write
from helpers.foreign import imported, run_config, said_by_the_teacher, vllm_rows, write_lines
from helpers.resumable import CLOCK
from helpers.tiny import ROWS, VOCAB, read_log, run_in_process, write_rows
from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.checkpoints.identity import tokenizer_identity
from torchtune_kd.config.reading import read_run_config
from torchtune_kd.errors import UserError

HALF = 2**-9  # of log-probabilities in fp16, relative
K = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Our own cache of the 8 likeliest ids, and vLLM's file of the same teacher."""
    folder = tmp_path_factory.mktemp("foreign")
    cfg = run_config(folder)
    write(cfg, folder / "own", kind="top_k", dtype=None, k=K, temperatures=[1])
    write_lines(folder / "vllm.jsonl", vllm_rows(said_by_the_teacher(cfg), K))
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "vllm.jsonl").read_text().splitlines()]


@pytest.mark.heavy
def test_a_run_from_an_imported_cache_is_that_from_our_own(folder, tmp_path, capsys):
    """But for fp16; the entropy of the teacher is not known, and not logged."""
    cfg = run_config(folder, tmp_path / "own")
    cache = imported(cfg, "vllm", folder / "vllm.jsonl", tmp_path / "cache", "--teacher-name", "tiny")
    said = capsys.readouterr().out
    assert "the 8 likeliest ids of" in said and "24 of the 24 rows of `dataset`\n" in said
    assert "7 of the 7 rows of `dataset_val`" in said and "renormalise" not in said
    logs = []
    for name, read in (("own", folder / "own"), ("imported", cache)):
        run = cached(cfg, read, output_dir=str(tmp_path / name))
        run_in_process(run)
        logs.append(read_log(run.output_dir))
    for ours, theirs in zip(*logs, strict=True):
        assert theirs.keys() == ours.keys() - {"teacher_entropy", "val_teacher_entropy"}
        for name in theirs.keys() - CLOCK:
            assert theirs[name] == pytest.approx(ours[name], rel=HALF, abs=HALF), name


def test_what_the_manifest_says(folder, tmp_path):
    cfg = run_config(folder)
    cache = imported(cfg, "vllm", folder / "vllm.jsonl", tmp_path / "cache", "--teacher-name", "tiny")
    manifest = CacheManifest.read(cache)
    assert (manifest.kind, manifest.k, manifest.temperatures, manifest.vocab) == ("top_k", K, [1.0], VOCAB)
    assert manifest.teacher["imported from"] == "vllm" and manifest.teacher["name of the teacher"] == "tiny"
    assert manifest.tokenizer == json.loads(json.dumps(tokenizer_identity(read_run_config(cfg, ()))))
    assert documents_of(cache).keys() == documents_of(folder / "own").keys()
    assert manifest.tokens == CacheManifest.read(folder / "own").tokens


def test_other_shapes_of_the_same_rows(folder, tmp_path):
    """A server's response, plain numbers, a folder of files, an id more at the end, a document twice."""
    rows = []
    for at, row in enumerate(rows_of(folder)):
        entries = [each and {key: value["logprob"] for key, value in each.items()} for each in row["prompt_logprobs"]]
        if at % 2:
            row = {"prompt_token_ids": [*row["prompt_token_ids"], 5], "prompt_logprobs": [*entries, {"7": -0.5}]}
        rows.append({"id": "cmpl", "choices": [row]})
    write_lines(tmp_path / "folder" / "a.jsonl", rows[:9])
    write_lines(tmp_path / "folder" / "more" / "b.jsonl", ["", *rows[5:]])
    cfg = run_config(folder)
    one = imported(cfg, "vllm", folder / "vllm.jsonl", tmp_path / "one")
    other = imported(cfg, "vllm", tmp_path / "folder", tmp_path / "other")
    assert documents_of(one) == documents_of(other)


def test_a_mass_of_the_rest_that_is_not_known(folder, tmp_path, capsys):
    """One token in all, of which what is stored sums to 1: the cache says no mass for any."""
    rows = rows_of(folder)
    rows[2]["prompt_logprobs"][1] = {"9": {"logprob": -1e-5}}
    cfg = run_config(folder, tmp_path / "out")
    cache = imported(cfg, "vllm", write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "cache")
    assert "not known for 1 tokens" in capsys.readouterr().out
    assert CacheManifest.read(cache).temperatures == []
    with pytest.raises(UserError, match="at these temperatures: none"):
        run_in_process(cached(cfg, cache))
    run = cached(cfg, cache, teacher_tail="renormalise")
    run_in_process(run)
    log = read_log(run.output_dir)
    assert "val_kl_cells" not in log[0] and "val_teacher_entropy" not in log[0] and "val_top1_agreement" in log[0]
    more = imported(cfg, "vllm", tmp_path / "rows.jsonl", tmp_path / "more", "--smallest-tail", "1e-6")
    assert CacheManifest.read(more).temperatures == [1.0]


def test_as_many_ids_as_a_token_has(folder, tmp_path):
    """A token with fewer ids is padded, and k is the most."""
    rows = rows_of(folder)
    short = rows[3]["prompt_logprobs"]
    short[1] = dict(list(short[1].items())[:2])
    short[2] = {
        key: {"logprob": value["logprob"] if at < 3 else -9999.0} for at, (key, value) in enumerate(short[2].items())
    }
    cache = imported(run_config(folder), "vllm", write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "cache")
    manifest = CacheManifest.read(cache)
    assert manifest.k == K and manifest.temperatures == [1.0]


def broken(change):
    def rows(folder):
        found = rows_of(folder)
        return change(found) or found

    return rows


def set_entry(value):
    return broken(lambda rows: rows[4]["prompt_logprobs"].__setitem__(1, value))


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (broken(lambda rows: [json.dumps(rows[0]), "{"]), r"line 2 of .*rows.jsonl is no JSON \(.*: correct or delete"),
        (broken(lambda rows: [rows[0], [1]]), "line 2 of .* is a list"),
        (broken(lambda rows: [{"text": "a"}]), "under `prompt_token_ids`, but line 1 of .* has none but text"),
        (broken(lambda rows: rows[1].pop("prompt_logprobs") and None), "`prompt_logprobs`, but line 2 .* has none but"),
        (broken(lambda rows: rows[2]["prompt_logprobs"].pop() and None), r"line 3 of .* has \d+ for \d+ ids"),
        (broken(lambda rows: rows[0].update(prompt_token_ids=["a"])), "a list of token ids .*, but line 1"),
        (set_entry({"400": -1.0}), f"ids below the models' {VOCAB}, but one at line 5 of .* is 400"),
        (set_entry({"4": 3.0}), "at most 0, but one at line 5 of .* is 3"),
        (set_entry({"4": -0.1, "5": -0.2}), "sum to a probability of 1.72"),
        (set_entry({"4": float("nan")}), "one at line 5 of .* is not a number"),
        (set_entry({"4": float("-inf")}), "one at line 5 of .* has none"),
        (set_entry({"4": -1.0, "04": -2.0}), "4 stands twice at line 5"),
        (set_entry({"4": "likely"}), "in `prompt_logprobs`, but line 5 of .* has {'4': 'likely'}"),
        (broken(lambda rows: [""]), "documents with log-probabilities, but .* has none"),
        (
            broken(lambda rows: [row | {"prompt_token_ids": [i + 1 for i in row["prompt_token_ids"]]} for row in rows]),
            r"but none of its 23 is among them: the first begins with the ids \[",
        ),
        (broken(lambda rows: rows[:-3]), r"it has 21 of the 24 rows of `dataset` and 7 of the 7 rows of `dataset_val`"),
        (
            broken(lambda rows: rows[20]["prompt_logprobs"].__setitem__(2, None)),
            r"23 of the 24 rows of `dataset` \(1 more without some of their labelled tokens\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder, tmp_path, capsys, rows, sentence):
    source = write_lines(tmp_path / "rows.jsonl", rows(folder))
    with pytest.raises(SystemExit) as ended:
        imported(run_config(folder), "vllm", source, tmp_path / "cache")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("error: ") == 1
    assert re.search(sentence, error), error
    assert not list(tmp_path.glob("cache*.partial")) and not (tmp_path / "cache").exists()


def test_part_of_the_data_if_asked(folder, tmp_path, capsys):
    source = write_lines(tmp_path / "rows.jsonl", rows_of(folder)[:-3])
    cache = imported(run_config(folder), "vllm", source, tmp_path / "cache", "--partial")
    assert "21 of the 24 rows of `dataset`" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 of the 24 rows of `dataset` are not in the cache"):
        run_in_process(cached(run_config(folder, tmp_path / "out"), cache))


@pytest.mark.parametrize(
    "options, change, sentence",
    [
        (["nowhere=", "--smallest-tail", "2"], {}, "Expected --smallest-tail from 0 to 1, got 2"),
        (["batch_size"], {}, "Expected key=value for a key of the config, got batch_size"),
        (["batchsize=3"], {}, "batchsize"),
        ([], {"tokenizer.path": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_of_the_command(folder, tmp_path, capsys, options, change, sentence):
    cfg = OmegaConf.merge(run_config(folder), {})
    for key, value in change.items():
        OmegaConf.update(cfg, key, value)
    with pytest.raises(SystemExit):
        imported(cfg, "vllm", folder / "vllm.jsonl", tmp_path / "cache", *options)
    assert sentence in capsys.readouterr().err


def test_a_folder_that_is_there(folder, tmp_path, capsys):
    cfg = run_config(folder)
    cache = imported(cfg, "vllm", folder / "vllm.jsonl", tmp_path / "cache")
    before = documents_of(cache)
    with pytest.raises(SystemExit):
        imported(cfg, "vllm", folder / "vllm.jsonl", cache)
    assert "already holds a cache: choose another or pass --overwrite" in capsys.readouterr().err
    cfg.dataset.data_files = str(write_rows(tmp_path / "few.jsonl", ROWS[5:9]))
    imported(cfg, "vllm", folder / "vllm.jsonl", cache, "--overwrite")
    assert documents_of(cache).keys() < before.keys()
    for output in (folder, folder / "teacher"):
        with pytest.raises(SystemExit):
            imported(cfg, "vllm", folder / "vllm.jsonl", output, "--overwrite")
    said = capsys.readouterr().err
    assert "does not hold" in said and "holds other files" in said
