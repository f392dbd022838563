"""Caches of the tiny teacher, written by the real recipe in this process, and what is done to them."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torchtune import config

from torchtune_kd.cache_teacher import read_request, write_cache
from torchtune_kd.caches.finish import write_manifest
from torchtune_kd.caches.layout import HEAD, SHARDS, CacheManifest
from torchtune_kd.caches.reader import CacheReader
from torchtune_kd.caches.shards import TABLE, Entry, positions_of, read_header, read_table, write_shard
from torchtune_kd.data.documents import documents_in_sample
from torchtune_kd.distributed.world import join_world
from torchtune_kd.training.signals import StopRequests


def cache_config(cfg: DictConfig, where: Path | None, **keys) -> DictConfig:
    """``cfg`` with the keys of ``cache``; fp32 unless they say otherwise, no dtype where it is None."""
    keys = ({"folder": str(where)} if where else {}) | {"dtype": "fp32"} | keys
    return OmegaConf.merge(cfg, {"cache": {key: value for key, value in keys.items() if key != "dtype" or value}})


def write(cfg: DictConfig, folder: Path, **keys) -> CacheManifest:
    request = read_request(cache_config(cfg, folder, **keys))
    return write_cache(request, join_world(request.config.settings), StopRequests())


def cached(cfg: DictConfig, folder: Path, **more) -> DictConfig:
    """``cfg`` with a cache in place of its teacher."""
    less = {"teacher_cache": str(folder), "teacher_model": None, "teacher_checkpointer": None}
    return OmegaConf.merge(cfg, less | more)


def documents_of(folder: Path) -> dict[bytes, bytes]:
    """Return what is stored of each document, every column as bytes; a document that is there twice is an error."""
    found = {}
    for file in sorted((folder / SHARDS).iterdir()):
        columns, _ = read_header(file)
        content, table = file.read_bytes(), read_table(file)
        for key, start, count in zip(table.key, table.start, table.count, strict=True):
            rows = b""
            for name, column in sorted(columns.items()):
                if name not in TABLE:
                    begin = column.offset + start * column.row_bytes
                    rows += content[begin : begin + count * column.row_bytes]
            assert key.tobytes() not in found
            found[key.tobytes()] = rows
    return found


def shard_of(folder: Path, cfg: DictConfig, row: int) -> tuple[Path, bytes]:
    """Return the shard in which the document of a row lies, and the document's key."""
    dataset = config.instantiate(cfg.dataset, config.instantiate(cfg.tokenizer))
    (document,) = documents_in_sample(dataset[row])
    reader = CacheReader(folder)
    return folder / SHARDS / reader.manifest.shards[reader.index.find(document.key).shard], document.key


def entries_of(shard: Path) -> list[Entry]:
    """Return what a shard holds, document by document."""
    tensors, table, entries = load_file(shard), read_table(shard), []
    marks = np.split(table.marks, np.cumsum(table.marked)[:-1])
    for key, start, count, bits in zip(table.key, table.start, table.count, marks, strict=True):
        columns = {name: column[start : start + count].clone() for name, column in tensors.items() if name not in TABLE}
        entries.append(Entry(key.tobytes(), positions_of(bits), columns))
    return entries


def doctored(folder: Path, change: Callable[[Entry], None]) -> None:
    """Change what a cache holds, document by document, with the checksums of what is there then."""
    manifest = CacheManifest.read(folder)
    files = {name: facts for name, facts in manifest.files.items() if name == HEAD}
    for name in manifest.shards:
        _, facts = read_header(folder / SHARDS / name)
        entries = entries_of(folder / SHARDS / name)
        for entry in entries:
            change(entry)
        (folder / SHARDS / name).unlink()
        new, written = write_shard(folder / SHARDS, entries, facts)
        files[f"{SHARDS}/{new}"] = written
    counted = ("documents", "tokens", "versions", "written_at", "index", "files", "format")
    write_manifest(folder, {key: value for key, value in asdict(manifest).items() if key not in counted}, files)
