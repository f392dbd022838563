"""DistillKit's Parquet files: decoded as DistillKit decodes them, cut into documents, imported."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from helpers.cached import cached, documents_of
from helpers.foreign import imported, run_config, said_by_the_teacher
from helpers.tiny import VOCAB, read_log, run_in_process
from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.errors import UserError
from torchtune_kd.tools.importing.distillkit import read_distillkit
from torchtune_kd.tools.importing.told import Likeliest, TopKCoding

GOLDEN = Path(__file__).parent / "data" / "distillkit"
K = 8
BITS = math.ceil(math.log2(VOCAB))


@pytest.mark.parametrize(
    "name, tolerance", [("polynomial", 2e-5), ("residuals", 1e-2), ("exact", 5e-3), ("legacy", 2e-5)]
)
def test_decoded_as_by_distillkit(name, tolerance):
    """Its own arithmetic rounds to the dtype of the exact values, fp16 in two of these, which ours does not."""
    decoded = np.load(GOLDEN / name / "decoded.npz")
    compression = GOLDEN / name / "distillation.yaml" if name == "legacy" else None
    told = list(read_distillkit(GOLDEN / name, compression))
    assert [len(each.documents[0]) for each in told] == [9, 3, 17]
    assert [len(each.positions) for each in told] == [8, 2, 16]
    values = decoded["values"]
    assert np.array_equal(np.concatenate([each.signal.ids for each in told]), decoded["ids"])
    assert np.abs(np.concatenate([each.signal.log_probs for each in told]) - values).max() < tolerance


def test_bits_and_differences_by_hand():
    """5 ids of 3 bits, 2 exact differences in fp16 and a third one by the constant -0.25."""
    from torchtune_kd.tools.importing.distillkit_coding import Compressed

    coding = Compressed(d=5, k=3, exact_k=2, exact_dtype="float16", polynomial_terms=[0], term_dtype="float16")
    halves = np.array([[-0.5, -1.5, -0.25]], dtype="<f2").view(np.uint8)
    ids = np.array([[0b100_001_01, 0b1_0000000]], dtype=np.uint8)
    found, log_probs = coding.decode(halves, ids, "here")
    assert found.tolist() == [[4, 1, 3]] and log_probs.tolist() == [[-0.5, -2.0, -2.25]]


def packed_bits(ids: torch.Tensor, bits: int) -> list[int]:
    text = "".join(f"{index:0{bits}b}" for index in ids.tolist())
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny teacher's 8 likeliest ids of each token: ids, bytes of ids, and values."""
    folder = tmp_path_factory.mktemp("distillkit")
    cfg = run_config(folder)
    said = said_by_the_teacher(cfg)
    rows = []
    for each in said:
        values, ids = each.log_probs[:-1].topk(K)
        rows.append(
            {
                "input_ids": each.tokens,
                "compressed_logprobs": [list(value.numpy().tobytes()) for value in values],
                "bytepacked_indices": [packed_bits(row, BITS) for row in ids],
                "token_ids": ids.tolist(),
                "top_values": values.tolist(),
            }
        )
    torch.save(rows, folder / "rows.pt")
    return folder


TYPES = {
    "input_ids": pa.list_(pa.uint64()),
    "attention_mask": pa.list_(pa.int64()),
    "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
    "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
    "token_ids": pa.list_(pa.list_(pa.int64())),
    "top_values": pa.list_(pa.list_(pa.float32())),
}
COMPRESSED = ("input_ids", "compressed_logprobs", "bytepacked_indices")
PLAIN = ("input_ids", "token_ids", "top_values")
COMPRESSION = {
    "d": VOCAB, "k": K, "exact_k": K, "exact_dtype": "float32", "polynomial_terms": None, "term_dtype": "float32",
    "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
}  # fmt: skip


def write(folder, rows, columns=COMPRESSED, compression=COMPRESSION, **types) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, types.get(name, TYPES[name])) for name in columns])
    table = pa.table({name: [row[name] for row in rows] for name in columns}, schema=schema)
    pq.write_table(table, folder / "data_0.parquet")
    if compression is not None:
        OmegaConf.save(OmegaConf.create(compression), folder / "compression_config.yaml")
    return folder


def rows_of(folder):
    return torch.load(folder / "rows.pt")


def padded(row: dict) -> dict:
    """As DistillKit's writer reads a text: with a token behind it, so that the last one has a signal."""
    more = {name: [*values, values[-1]] for name, values in row.items() if name != "input_ids"}
    return more | {"input_ids": [*row["input_ids"], 0]}


def packed(rows: list[dict]) -> dict:
    """As DistillKit packs rows that have a signal for every token."""
    names = [name for name in rows[0] if name in TYPES]
    marks = [mark for mark, row in enumerate(rows, 1) for _ in row["input_ids"]]
    return {name: [value for row in rows for value in row[name]] for name in names} | {"attention_mask": marks}


def signal_for_all(row: dict) -> dict:
    return padded(row) | {"input_ids": row["input_ids"]}


@pytest.mark.heavy
def test_imported_it_trains(folder, tmp_path, capsys):
    cfg = run_config(folder, tmp_path / "out")
    cache = imported(cfg, "distillkit", write(tmp_path / "source", rows_of(folder)), tmp_path / "cache")
    assert "24 of the 24 rows of `dataset`" in capsys.readouterr().out
    manifest = CacheManifest.read(cache)
    assert (manifest.k, manifest.temperatures, manifest.teacher["imported from"]) == (K, [1.0], "distillkit")
    live = run_config(folder, tmp_path / "live")
    logs = []
    for run in (cached(cfg, cache), live):
        run_in_process(run)
        logs.append(read_log(run.output_dir))
    ours, theirs = (log[0] for log in logs)  # before training
    assert ours["val_class_loss"] == pytest.approx(theirs["val_class_loss"])
    assert 0 < ours["val_kl_cells"] <= theirs["val_kl"]  # of 9 cells it is at most what it is of all ids


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: {"rows": rows, "columns": PLAIN, "compression": None},
        lambda rows: {"rows": [padded(row) for row in rows]},
        lambda rows: {"rows": [signal_for_all(row) for row in rows]},
        lambda rows: {
            "rows": [packed([signal_for_all(row) for row in rows[at : at + 5]]) for at in range(0, len(rows), 5)],
            "columns": ("attention_mask", *COMPRESSED),
        },
        lambda rows: {"rows": rows, "compressed_logprobs": pa.large_list(pa.list_(pa.uint8(), 4 * K))},
        lambda rows: {"rows": rows, "bytepacked_indices": pa.list_(pa.list_(pa.int64()))},
        lambda rows: {"rows": rows, "compression": {"teacher": {"logprob_compressor": COMPRESSION}}},
    ],
    ids=["plain", "padded", "a signal for all", "packed", "other lists", "wider integers", "DistillKit's own config"],
)  # fmt: skip
def test_the_same_documents_in_other_files(folder, tmp_path, change):
    cfg, rows = run_config(folder), rows_of(folder)
    one = imported(cfg, "distillkit", write(tmp_path / "a", rows), tmp_path / "one")
    other = imported(cfg, "distillkit", write(tmp_path / "b", **change(rows)), tmp_path / "other")
    assert documents_of(one) == documents_of(other)


def test_logits_have_no_known_mass_of_the_rest(folder, tmp_path):
    rows = rows_of(folder)
    for row in rows:
        row["top_values"] = [[value + 20 for value in values] for values in row["top_values"]]
    source = write(tmp_path / "source", rows, PLAIN, None)
    cache = imported(run_config(folder), "distillkit", source, tmp_path / "cache")
    assert CacheManifest.read(cache).temperatures == []


FITTED = COMPRESSION | {"exact_k": 4, "polynomial_terms": [0, 1]}


def test_what_is_fitted_says_nothing_of_the_rest(folder, tmp_path):
    """The exact ones alone do: their cache is that of the 4 likeliest ids."""
    cfg, rows = run_config(folder), rows_of(folder)
    four = [
        {name: [each[:4] for each in row[name]] if name in PLAIN[1:] else row[name] for name in PLAIN} for row in rows
    ]
    for row in rows:
        line = [list(np.array([-9.0, -1.0], dtype="<f4").tobytes()) for _ in row["compressed_logprobs"]]
        row["compressed_logprobs"] = [a[:16] + b for a, b in zip(row["compressed_logprobs"], line, strict=True)]
    source = write(tmp_path / "source", rows, compression=FITTED)
    manifest = CacheManifest.read(imported(cfg, "distillkit", source, tmp_path / "all"))
    assert manifest.temperatures == [] and manifest.error == {"fitted_tokens": manifest.tokens}
    exact = imported(cfg, "distillkit", source, tmp_path / "exact", "--exact-only")
    assert CacheManifest.read(exact).temperatures == [1.0]
    plain = write(tmp_path / "plain", four, PLAIN, None)
    assert documents_of(exact) == documents_of(imported(cfg, "distillkit", plain, tmp_path / "four"))


def test_a_mass_of_the_rest_that_rounding_hides(tmp_path):
    """0.7 and 0.29 in bf16 sum to 0.99 with an error of up to 0.3 %: 1 % is not known, 10 % is."""
    log_probs = np.log(np.array([[0.7, 0.29], [0.6, 0.3]]))
    error = 2**-8 * (np.exp(log_probs) * -log_probs).sum(-1)
    coding = TopKCoding(9)
    columns = coding(Likeliest(np.array([[1, 2], [1, 2]]), log_probs, error), np.array([1, 1]), "here")
    tail = columns["tail"].squeeze(-1).exp()
    assert tail[0].isnan() and tail[1] == pytest.approx(0.1, rel=1e-5) and coding.unknown == 1


def without(name):
    return {key: value for key, value in COMPRESSION.items() if key != name}


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"columns": ("input_ids", "token_ids")}, "beside compressed_logprobs, bytepacked_indices; or .*has input_ids"),
        ({"compression": None}, "Expected compression_config.yaml beside .*: name it, .* under --compression"),
        ({"compression": without("k")}, "Expected `k` in DistillKit's compression config"),
        ({"compression": COMPRESSION | {"zstd": True}}, "has the key `zstd`, which this version does not know"),
        ({"compression": COMPRESSION | {"exact_dtype": "fp4"}}, "has `fp4`, which this version does not know"),
        ({"compression": COMPRESSION | {"polynomial_terms": ["log"]}}, "has `log`, which"),
        ({"compression": COMPRESSION | {"exact_k": 9}}, "exact_k 9 of k 8"),
        ({"compression": COMPRESSION | {"d": 1000}}, "Expected 10 values of each token under `bytepacked_indices`"),
        ({"compression": COMPRESSION | {"exact_k": 7, "polynomial_terms": [0, 1]}}, "Expected 36 .*compressed_log"),
        (
            {"compression": {"k": 8, "exact_k": 8, "polynomial_degree": 0, "vocab_size": 384}},
            "Expected the compression of compressed_logprobs, .* is of packed_indices",
        ),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(folder, tmp_path, keys, sentence):
    source = write(tmp_path / "source", rows_of(folder), **keys)
    with pytest.raises(UserError, match=sentence):
        list(read_distillkit(source))


def test_rows_that_do_not_fit(folder, tmp_path):
    def refused(sentence, **change):
        rows = rows_of(folder)[:3]
        rows[1] = {**rows[1], **{name: value(rows[1][name]) for name, value in change.items()}}
        with pytest.raises(UserError, match=sentence):
            list(read_distillkit(write(tmp_path / "source", rows)))

    refused(
        r"row 1 of .* has \d+ ids, \d+ of `compressed_logprobs` and \d+ of `byte", bytepacked_indices=lambda v: v[1:]
    )
    refused(r"row 1 of .* has \d+ ids", input_ids=lambda values: [*values, 3, 4])
    refused("tokens with 9 and with 10", bytepacked_indices=lambda values: [[*values[0], 0], *values[1:]])
    refused("have 1 empty cells", compressed_logprobs=lambda values: None)
    (tmp_path / "source" / "data_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as one"):
        list(read_distillkit(tmp_path / "source"))
    with pytest.raises(UserError, match=r"with \*.parquet, but .*empty has none"):
        list(read_distillkit(tmp_path / "empty"))
