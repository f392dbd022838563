"""The folder of a cache while it is written: prepared, checked, and finished by its manifest."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from torchtune_kd.caches.finish import unreadable, wait_for_files, write_manifest
from torchtune_kd.caches.index import Index, whole_shards
from torchtune_kd.caches.layout import HEAD, SHARDS, CacheManifest, shards_of
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


_LESS = {
    "hidden": "`cache.dtype: int8` takes half of bf16, `cache.kind: top_k` a twentieth",
    "top_k": "a smaller `cache.k`",
    "sampled": "fewer `cache.samples`",
}


def check_shards(folder: Path, facts: Mapping[str, Any], world: World) -> Index:
    """Return the index of the shards that are there: those that rank 0 sees, since others may see them late.

    A head without shards that another writer left is deleted.

    Raises:
        UserError: on every process, for a shard or a head of another cache, one that cannot be read, or 8-bit states
            without their head.
    """
    index, problem = None, None
    if world.is_rank_zero:
        try:
            index = _index_of(folder, facts)
        except UserError as error:
            problem = str(error)
    index, problem = world.gather((index, problem))[0]
    if problem is not None:
        raise UserError(problem)
    return index


def _index_of(folder: Path, facts: Mapping[str, Any]) -> Index:
    names, head = whole_shards(folder), _head_facts(folder)
    if head is not None and not names and head != json.loads(json.dumps(facts)):
        (folder / HEAD).unlink(missing_ok=True)
        head = None
    if head is not None:
        _check_facts(folder, HEAD, head, facts)
    elif names and facts["dtype"] == "int8":
        raise UserError(
            f"The file {HEAD} of the cache in {folder} is gone or cannot be read, without which its 8-bit states mean "
            "nothing: delete the folder and write it anew."
        )
    for name in names:
        try:
            _, theirs = read_header(folder / SHARDS / name)
        except Damaged as error:
            raise UserError(f"The cache in {folder} is damaged, {error}: delete that file and start again.") from error
        _check_facts(folder, name, theirs, facts)
    return Index.of_shards(folder, names)


def _check_facts(folder: Path, name: str, theirs: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        if theirs.get(key) != value:
            raise UserError(
                f"The folder {folder} holds a cache with another {key} ({_shown(theirs.get(key))} in {name}, now "
                f"{_shown(value)}): name another `cache.folder`, or delete that one."
            )


def _head_facts(folder: Path) -> dict[str, Any] | None:
    """Return what the head says of its cache; None, and the file deleted, where it cannot be read."""
    file = folder / HEAD
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as head:
            return json.loads(head.metadata()["cache"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        file.unlink(missing_ok=True)
        return None


def check_room(folder: Path, needed: int, kind: str, world: World) -> int:
    """Return the bytes that are free, after seeing that ``needed`` bytes fit.

    Raises:
        UserError: on every process.
    """
    free, needed = world.gather((shutil.disk_usage(folder).free, needed))[0]
    if needed > free:
        raise UserError(
            f"Expected {size(needed)} of room in {folder}, but {size(free)} are free: make room, name another "
            f"`cache.folder`, or store less ({_LESS[kind]})."
        )
    return free


def finish(
    folder: Path,
    facts: Mapping[str, Any],
    positions: str,
    written: Mapping[str, dict[str, Any]],
    world: World,
    *,
    new_head: bool,
    verify: bool = False,
) -> CacheManifest:
    """Write the index and, last, the manifest; all processes call this together.

    On a network file system a process may see late what another has written. So the shards' names come from those that
    wrote them, rank 0's listing counts for what was there before, and what is to be read is waited for.

    Args:
        folder (Path): the cache's.
        facts (Mapping[str, Any]): what each shard says of the cache.
        positions (str): which tokens were asked for.
        written (Mapping[str, dict[str, Any]]): ``bytes`` and ``sha256`` of the shards that this process wrote.
        world (World): the processes; each reads its part of the shards that are not known yet.
        new_head (bool): the head was written just now.
        verify (bool): read all files, and compare.

    Raises:
        RunError: on every process, if a shard is not what was written, or cannot be seen or read.
    """
    seen = (_manifest_before(folder), whole_shards(folder)) if world.is_rank_zero else None
    before, listed = world.gather(seen)[0]
    known = dict(before.files) if before is not None else {}
    for of_rank in world.gather(dict(written)):
        known |= {f"{SHARDS}/{name}": file for name, file in of_rank.items()}
    names = [f"{SHARDS}/{name}" for name in sorted({*listed, *shards_of(known)})]
    files = {name: known[name] for name in names if name in known}
    if before is not None and not new_head:
        files[HEAD] = before.files[HEAD]
    read = [name for name in (*names, HEAD) if verify or name not in files]
    found: dict[str, dict[str, Any]] = {}
    for of_rank, problem in world.gather(_facts_of(folder, read[world.rank :: world.size])):
        if problem is not None:
            raise RunError(problem)
        found |= of_rank
    changed = [name for name, file in found.items() if files.get(name, file) != file]
    if changed:
        raise RunError(
            f"The file {changed[0]} in {folder} is not what was written, nor are {len(changed) - 1} others: delete "
            "them and start again with the same command, which writes what is missing."
        )
    files = {**found, **files}
    same = before is not None and before.files == {**files, before.index: before.files[before.index]}
    problem, manifest = None, None
    if world.is_rank_zero:
        try:
            if not same:
                write_manifest(folder, {**facts, "positions": positions, "error": _error_in_head(folder)}, files)
            manifest = CacheManifest.read(folder)
        except (RunError, UserError) as cause:
            problem = str(cause)
        except OSError as cause:
            problem = (
                f"The manifest could not be written into {folder} ({first_line(cause)}): make room and start again."
            )
    problem, manifest = world.gather((problem, manifest))[0]
    if problem is not None:
        raise RunError(problem)
    return manifest


def _facts_of(folder: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return ``bytes`` and ``sha256`` of files by name, and what went wrong, if anything did."""
    try:
        wait_for_files(folder, names)
        return {name: file_facts(folder / name) for name in names}, None
    except RunError as error:
        return {}, str(error)
    except OSError as error:
        return {}, str(unreadable(folder, error))


def _error_in_head(folder: Path) -> dict[str, float]:
    """Return what the stored states change, as it was measured before the first was written."""
    try:
        with safe_open(folder / HEAD, "pt") as head:
            return json.loads(head.metadata()["error"])
    except (OSError, SafetensorError) as error:
        raise unreadable(folder, error) from error


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
