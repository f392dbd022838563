"""Caches of the tiny teacher, written by the real recipe in this process."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.cache_teacher import read_request, write_cache
from torchtune_kd.caches.layout import SHARDS, CacheManifest
from torchtune_kd.caches.shards import TABLE, read_header, read_table
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
