"""Shards, index and reader: what was written comes back, and what was changed is named."""

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from torchtune_kd.caches.index import Index, whole_shards
from torchtune_kd.caches.layout import HEAD, SHARDS, CacheManifest
from torchtune_kd.caches.reader import CacheReader
from torchtune_kd.caches.shards import Entry, marks_of, positions_of, read_header, read_table, write_shard
from torchtune_kd.data.documents import Document
from torchtune_kd.errors import RunError, UserError
from torchtune_kd.storage.manifest import Damaged, file_facts

D = 6


def entry(number, positions, seed=0):
    generator = torch.Generator().manual_seed(100 * number + seed)
    states = torch.randint(-127, 128, (len(positions), D), generator=generator, dtype=torch.int8)
    scale = torch.randn(len(positions), generator=generator).half()
    return Entry(bytes([number]) * 16, np.array(positions), {"states": states, "scale": scale})


ENTRIES = [[entry(7, [0, 1, 4]), entry(0, [2])], [entry(3, [0, 1, 2, 3, 9]), entry(255, [5, 6])]]


def document(written, positions=None):
    positions = written.positions if positions is None else np.array(positions)
    return Document(written.key, 0, 20, positions)


@pytest.fixture
def cache(tmp_path):
    (tmp_path / SHARDS).mkdir()
    files = {}
    for entries in ENTRIES:
        name, facts = write_shard(tmp_path / SHARDS, entries, {"kind": "hidden"})
        files[f"{SHARDS}/{name}"] = facts
    save_file({"weight": torch.randn(9, D), "channel_rms": torch.ones(D)}, tmp_path / HEAD)
    index = Index.of_shards(tmp_path, whole_shards(tmp_path))
    name, files[name] = index.write(tmp_path)
    files[HEAD] = file_facts(tmp_path / HEAD)
    CacheManifest(
        "hidden",
        "int8",
        None,
        [],
        None,
        "fp32",
        "labels",
        D,
        9,
        False,
        {},
        {},
        len(index),
        index.tokens,
        {},
        {},
        "now",
        name,
        files,
    ).write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("positions", [[0], [7], [8], [0, 5, 8, 30], []])
def test_positions_as_bits(positions):
    assert positions_of(marks_of(np.array(positions, dtype=np.int64))).tolist() == positions


def test_what_was_written_comes_back_in_the_order_asked_for(cache):
    reader = CacheReader(cache)
    asked = [ENTRIES[1][1], ENTRIES[0][0], ENTRIES[1][0], ENTRIES[0][1], ENTRIES[0][0]]
    columns = reader.read([document(written) for written in asked]).columns()
    for name in ("states", "scale"):
        assert torch.equal(columns[name], torch.cat([written.columns[name] for written in asked]))
    assert reader.index.tokens == 11 and len(reader.index) == 4
    assert reader.read([]).columns() == {}


def test_some_of_the_positions_of_a_document(cache):
    written = ENTRIES[1][0]
    columns = CacheReader(cache).read([document(written, [1, 9])]).columns()
    assert torch.equal(columns["states"], written.columns["states"][[1, 4]])


def test_the_index_knows_what_is_stored(cache):
    index = CacheReader(cache).index
    written = ENTRIES[0][0]
    assert index.holds(written.key, np.array([0, 1, 4])) and index.holds(written.key, np.array([1, 4]))
    assert not index.holds(written.key, np.array([2])) and not index.holds(written.key, np.array([0, 1, 5]))
    assert not index.holds(bytes(16)[:15] + b"\1", np.array([0])) and index.find(bytes([8]) * 16) is None


def test_of_a_document_in_two_shards_the_larger_counts(tmp_path):
    (tmp_path / SHARDS).mkdir()
    larger = entry(7, [0, 1, 4, 5], seed=1)
    for entries in ([entry(7, [0, 1, 4]), entry(2, [1])], [larger, entry(9, [0])]):
        write_shard(tmp_path / SHARDS, entries, {})
    index = Index.of_shards(tmp_path, whole_shards(tmp_path))
    assert len(index) == 3 and index.find(larger.key).positions.tolist() == [0, 1, 4, 5]


def test_the_index_can_be_put_together_again(cache):
    first = CacheReader(cache).manifest.index
    (cache / first).unlink()
    assert Index.of_shards(cache, whole_shards(cache)).write(cache)[0] == first


def shard_with(cache, written):
    (name,) = (
        name for name in whole_shards(cache) if bytes(written.key) in read_table(cache / SHARDS / name).key.tobytes()
    )
    return cache / SHARDS / name


def test_a_flipped_byte_names_file_and_document(cache):
    written = ENTRIES[1][1]
    file = shard_with(cache, written)
    columns, _ = read_header(file)
    content = bytearray(file.read_bytes())
    content[columns["states"].offset + 5 * columns["states"].row_bytes + 3] ^= 1  # row 0 of the second document
    file.write_bytes(content)
    reader = CacheReader(cache)
    assert reader.read([document(ENTRIES[1][0])]).columns()
    with pytest.raises(RunError, match=f"The document {written.key.hex()} in .*{file.name} is not what was written"):
        reader.read([document(written)]).columns()


@pytest.mark.parametrize("which", ["index", "head"])
def test_a_flipped_byte_of_index_or_head_is_found_before_anything_is_read(cache, which):
    manifest = CacheReader(cache).manifest
    file = cache / (manifest.index if which == "index" else HEAD)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged, the content of {file.name} has changed since it was written"):
        CacheReader(cache).head()


def test_a_document_that_is_not_there(cache):
    with pytest.raises(RunError, match="A document of 20 tokens is not in the cache"):
        CacheReader(cache).read([Document(bytes([1]) * 16, 0, 20, np.array([0]))])


@pytest.mark.parametrize("name", ["shard", HEAD, "index"])
def test_files_that_are_cut_short_or_gone_are_named(cache, name):
    reader = CacheReader(cache)
    file = {"shard": shard_with(cache, ENTRIES[0][0]), HEAD: cache / HEAD, "index": cache / reader.manifest.index}[name]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"the file .*{file.name} has {len(content) - 1} bytes instead of"):
        CacheReader(cache)
    file.unlink()
    with pytest.raises(UserError, match=f"the file .*{file.name} is missing: run `tune run torchtune_kd/cache_teacher"):
        CacheReader(cache)


def test_no_cache_an_unfinished_one_and_an_edited_manifest(cache, tmp_path):
    with pytest.raises(UserError, match=r"but .*nowhere is none"):
        CacheReader(tmp_path / "nowhere")
    manifest = cache / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"vocab": 9', '"vocab": 8'))
    with pytest.raises(UserError, match=r"its manifest\.json is not as it was written"):
        CacheReader(cache)
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match=r"its format is 2, and this version reads 1"):
        CacheReader(cache)
    manifest.unlink()
    with pytest.raises(UserError, match=r"is unfinished, it has no manifest\.json"):
        CacheReader(cache)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\x05\0\0\0\0\0\0\0{}{}{", b"\x02\0\0\0\0\0\0\0{}"])
def test_no_shard(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(Damaged):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("change", [1, ord("I") ^ ord("U")])
def test_a_changed_byte_of_a_shards_header_is_named_or_changes_nothing(cache, change):
    """Checksums are of rows alone; a header says where they lie, and what they are."""
    written = ENTRIES[1][0]
    file = shard_with(cache, written)
    content, named = file.read_bytes(), 0
    for at in range(8 + int.from_bytes(content[:8], "little")):
        file.write_bytes(content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
        try:
            columns = CacheReader(cache).read([document(written)]).columns()
        except RunError as error:
            assert file.name in str(error) and written.key.hex() in str(error)
            named += 1
        else:
            assert columns.keys() == written.columns.keys(), at
            assert all(torch.equal(column, written.columns[name]) for name, column in columns.items()), at
    assert named > 300


def cut(file):
    """Leave a shard's header, and nothing of what it describes."""
    content = file.read_bytes()
    file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda file: file.unlink(), "No such file or directory"),
        (cut, r"the file .* has \d+ bytes instead of \d+"),
        (lambda file: file.write_bytes(b""), "cannot be read as a shard"),
        (lambda file: (file.unlink(), file.mkdir()), "Is a directory"),
    ],
    ids=["gone", "cut short", "empty", "a folder"],
)
@pytest.mark.parametrize("seen", [False, True], ids=["not yet read", "read before"])
def test_a_shard_that_is_lost_while_it_is_used_is_named_with_the_document(cache, harm, why, seen):
    written = ENTRIES[1][1]  # the last of its shard
    file, reader = shard_with(cache, written), CacheReader(cache)
    if seen:
        assert reader.read([document(written)]).columns()
        why = f"{why}|it ends .* bytes too early"
    harm(file)
    with pytest.raises(
        RunError, match=rf"The document {written.key.hex()} in {file} cannot be read, .*({why})"
    ) as ended:
        reader.read([document(written)]).columns()
    assert "see that its disk is there, or delete that file and run" in str(ended.value)


def test_what_no_thread_has_begun_to_read_is_given_up_at_the_end(cache, monkeypatch):
    """So that a process that ends with an error does not wait for all that it had announced."""
    monkeypatch.setattr("torchtune_kd.caches.reader.THREADS", 1)
    begun, go_on, read = threading.Event(), threading.Event(), []

    def slow(descriptor, memory, offset):
        begun.set()
        assert go_on.wait(60)
        read.append(offset)

    monkeypatch.setattr("torchtune_kd.caches.reader._read_whole", slow)
    reader = CacheReader(cache)
    first, second = (reader.read([document(written)]) for written in ENTRIES[0])
    assert begun.wait(60)
    reader.close()
    go_on.set()
    with pytest.raises(CancelledError):
        second.columns()
    with pytest.raises(RunError, match="its checksum differs"):  # nothing was read into its memory
        first.columns()
    assert len(read) == 2


def test_a_folder_that_cannot_be_read_is_no_missing_cache(tmp_path):
    """A name that leads to itself, which root cannot follow either."""
    folder = tmp_path / "cache"
    folder.symlink_to(folder)
    with pytest.raises(UserError, match=rf"The cache in {folder} cannot be read \(.*: see that its disk is there"):
        CacheReader(folder)
