"""``manifest.json``: what a folder holds, what it was made with, and what each file must look like.

:class:`Manifest` is a checkpoint's. Other folders keep fields of their own in the same form (:func:`manifest_text`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchtune_kd.storage.fingerprints import file_sha256

NAME = "manifest.json"
FORMAT = 1


class Damaged(ValueError):
    """A folder that cannot be trusted. The message says what was found, without a full stop."""


@dataclass
class Manifest:
    """Facts about a checkpoint, readable with any editor."""

    progress: dict[str, Any]  # where the run stood: see torchtune_kd.checkpoints.progress
    seed: int
    processes: int
    identity: dict[str, dict[str, Any]]  # see torchtune_kd.checkpoints.identity
    config: dict[str, Any]
    versions: dict[str, str]
    saved_at: str  # ISO 8601, UTC
    validation: dict[str, float] | None = None  # of this very step, where there was one
    log_file: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name: {"bytes", "sha256"}
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write and flush to disk, with a checksum over all fields."""
        with (folder / NAME).open("w", encoding="utf-8") as file:
            file.write(manifest_text(asdict(self)))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest in ``folder``.

        Raises:
            Damaged: if it cannot be read or is not what was written.
        """
        return cls(**read_manifest(folder, {each.name for each in fields(cls)}, FORMAT))

    def check_files(self, folder: Path, names: Iterable[str]) -> None:
        """Compare size and content of some of the files.

        Raises:
            Damaged: naming the first that is missing, cut short or changed.
        """
        for name in names:
            check_size(folder, name, self.files[name])
            check_content(folder, name, self.files[name])


def manifest_text(fields: Mapping[str, Any]) -> str:
    """Return a manifest as JSON, with a checksum over all of its fields."""
    content = json.loads(json.dumps(fields))  # as it will be read: keys are strings, tuples lists
    content["checksum"] = _checksum(content)
    return json.dumps(content, indent=1)


def read_manifest(folder: Path, names: Set[str], format: int) -> dict[str, Any]:
    """Return the fields of the manifest in ``folder``.

    Args:
        folder (Path): holds it.
        names (Set[str]): the fields it must have.
        format (int): what its field ``format`` must be.

    Raises:
        Damaged: if it cannot be read or is not what was written.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except FileNotFoundError as error:
        raise Damaged(f"it has no {NAME}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"its {NAME} cannot be read") from error
    if content.get("format") != format:
        raise Damaged(f"its format is {content.get('format')}, and this version reads {format}")
    if checksum != _checksum(content):
        raise Damaged(f"its {NAME} is not as it was written")
    if content.keys() != names:
        raise Damaged(f"its {NAME} has the fields of another version")
    return content


def check_size(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Refuse a file that is not there, or has another size than ``expected["bytes"]``.

    Raises:
        Damaged: naming it.
    """
    path = folder / name
    if not path.is_file():
        raise Damaged(f"the file {name} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise Damaged(f"the file {name} has {size} bytes instead of {expected['bytes']}")


def check_content(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Read a file whole, and refuse one whose SHA-256 is not ``expected["sha256"]``.

    Raises:
        Damaged: naming it.
    """
    if file_facts(folder / name) != expected:
        raise Damaged(f"the content of {name} has changed since it was written")


def file_facts(path: Path) -> dict[str, Any]:
    """Return ``bytes`` and ``sha256`` of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
