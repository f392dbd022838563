"""The folder of a cache while it is written: prepared, checked, and finished by its manifest."""

import json
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import safe_open

from torchtune_kd._versions import installed_versions
from torchtune_kd.caches.index import Index, whole_shards
from torchtune_kd.caches.layout import HEAD, SHARDS, CacheManifest
from torchtune_kd.caches.shards import read_header
from torchtune_kd.checkpoints.folders import check_one_folder
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import RunError, UserError, first_line
from torchtune_kd.storage.atomic import PARTIAL
from torchtune_kd.storage.manifest import NAME, Damaged, file_facts


def prepare(folder: Path, world: World) -> None:
    """Make the folder, drop what a killed writer had begun, and see that all processes see it.

    Raises:
        UserError: on every process, if it cannot be written or is not one folder for all.
    """
    problem = None
    if world.is_rank_zero:
        try:
            (folder / SHARDS).mkdir(parents=True, exist_ok=True)
            for left in (*folder.glob(f"*{PARTIAL}"), *(folder / SHARDS).glob(f"*{PARTIAL}")):
                left.unlink()
        except OSError as error:
            problem = f"Expected `cache.folder` to be a folder that can be written, got {folder}: {first_line(error)}."
    problem = world.gather(problem)[0]
    if problem is not None:
        raise UserError(problem)
    check_one_folder(folder, "cache.folder", world)


def check_shards(folder: Path, facts: Mapping[str, Any]) -> Index:
    """Return the index of the shards that are there.

    Raises:
        UserError: for a shard of another cache, or one that cannot be read.
    """
    names = whole_shards(folder)
    for name in names:
        try:
            _, theirs = read_header(folder / SHARDS / name)
        except Damaged as error:
            raise UserError(f"The cache in {folder} is damaged, {error}: delete that file and start again.") from error
        for key, value in facts.items():
            if theirs.get(key) != value:
                raise UserError(
                    f"The folder {folder} holds a cache with another {key} ({_shown(theirs.get(key))}, now "
                    f"{_shown(value)}): name another `cache.folder`, or delete that one."
                )
    return Index.of_shards(folder, names)


def check_room(folder: Path, needed: int, world: World) -> int:
    """Return the bytes that are free, after seeing that ``needed`` bytes fit.

    Raises:
        UserError: on every process.
    """
    free = world.gather(shutil.disk_usage(folder).free)[0]
    if needed > free:
        raise UserError(
            f"Expected {size(needed)} of room in {folder}, but {size(free)} are free: make room, `cache.dtype: int8` "
            "takes half of bf16, or name another `cache.folder`."
        )
    return free


def finish(
    folder: Path,
    facts: Mapping[str, Any],
    positions: str,
    written: Mapping[str, dict[str, Any]],
    world: World,
    *,
    verify: bool = False,
) -> CacheManifest:
    """Write the index and, last, the manifest; all processes call this together.

    Args:
        folder (Path): the cache's.
        facts (Mapping[str, Any]): what each shard says of the cache.
        positions (str): which tokens were asked for.
        written (Mapping[str, dict[str, Any]]): ``bytes`` and ``sha256`` of the shards that this process wrote.
        world (World): the processes; each reads its part of the shards that are not known yet.
        verify (bool): read all of them, and compare.

    Raises:
        RunError: on every process, if a shard is not what was written.
    """
    before = _manifest_before(folder)
    known = dict(before.files) if before is not None else {}
    for of_rank in world.gather(dict(written)):
        known |= {f"{SHARDS}/{name}": file for name, file in of_rank.items()}
    names = [f"{SHARDS}/{name}" for name in whole_shards(folder)]
    files = {name: known[name] for name in names if name in known}
    read = names if verify else [name for name in names if name not in files]
    found: dict[str, dict[str, Any]] = {}
    for of_rank in world.gather({name: file_facts(folder / name) for name in read[world.rank :: world.size]}):
        found |= of_rank
    changed = [name for name, file in found.items() if files.get(name, file) != file]
    if changed:
        raise RunError(
            f"The file {changed[0]} in {folder} is not what was written, nor are {len(changed) - 1} others: delete "
            "them and start again with the same command, which writes what is missing."
        )
    if world.is_rank_zero:
        _write_manifest(folder, facts, positions, {**found, **files})
    world.barrier()
    return CacheManifest.read(folder)


def _write_manifest(
    folder: Path, facts: Mapping[str, Any], positions: str, shards: Mapping[str, dict[str, Any]]
) -> None:
    index = Index.of_shards(folder, [Path(name).name for name in sorted(shards)])
    index_name, index_file = index.write(folder)
    with safe_open(folder / HEAD, "pt") as head:
        error = json.loads(head.metadata()["error"])
    CacheManifest(
        **facts,
        positions=positions,
        documents=len(index),
        tokens=index.tokens,
        error=error,
        versions=installed_versions(),
        written_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        index=index_name,
        files={**shards, HEAD: file_facts(folder / HEAD), index_name: index_file},
    ).write(folder)
    for old in folder.glob("index-*.safetensors"):
        if old.name != index_name:
            old.unlink()


def _manifest_before(folder: Path) -> CacheManifest | None:
    """Return the manifest of a cache that is being added to; None where there is none that can be used."""
    if not (folder / NAME).is_file():
        return None
    try:
        return CacheManifest.read(folder)
    except UserError:  # a shard was deleted, as the sentence of a damaged one asks for
        return None


def size(number: float) -> str:
    """Say a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
