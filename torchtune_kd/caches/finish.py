"""The end of writing a cache: its index, then its manifest."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torchtune_kd._versions import installed_versions
from torchtune_kd.caches.index import Index, whole_shards
from torchtune_kd.caches.layout import CacheManifest


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, dict[str, Any]]) -> None:
    """Write index and manifest of a folder whose shards, and other ``files``, are whole; older indices go.

    Args:
        folder (Path): the cache's.
        facts (Mapping[str, Any]): the fields of :class:`CacheManifest` that do not follow from the shards.
        files (Mapping[str, dict[str, Any]]): ``bytes`` and ``sha256`` of every shard and of the head.
    """
    index = Index.of_shards(folder, whole_shards(folder))
    name, file = index.write(folder)
    CacheManifest(
        **facts,
        documents=len(index),
        tokens=index.tokens,
        versions=installed_versions(),
        written_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        index=name,
        files={**files, name: file},
    ).write(folder)
    for old in folder.glob("index-*.safetensors"):
        if old.name != name:
            old.unlink()
