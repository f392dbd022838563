"""A cache's folder, and what its manifest says.

    manifest.json            written last: a folder without one is unfinished
    head.safetensors         weight [V, D] and bias [V] of the teacher's head; channel_rms [D]
    index-<hash>.safetensors where each document lies, see :mod:`torchtune_kd.caches.index`
    shards/<hash>.safetensors rows of tokens, and a table of the documents in it

Shapes: V vocabulary, D hidden width of the teacher.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from torchtune_kd.caches import log_probs, states
from torchtune_kd.errors import UserError, first_line
from torchtune_kd.storage.atomic import write_text
from torchtune_kd.storage.manifest import NAME, Damaged, check_size, manifest_text, read_manifest

FORMAT = 1
HEAD, SHARDS = "head.safetensors", "shards"
KINDS = ("hidden", "top_k", "sampled")
DTYPES = ("fp32", "bf16", "fp16", "int8")
POSITIONS = ("labels", "all")
IMPORTED = "imported from"  # a key of the teacher that says which other project's files a cache was made of


@dataclass
class CacheManifest:
    """Facts about a cache, readable with any editor.

    Attributes:
        kind (str): one of :data:`KINDS`.
        dtype (str | None): of the states, one of :data:`DTYPES`; None where there are none.
        k (int | None): likeliest ids of a token that are stored.
        temperatures (list[float]): at which the mass of the rest is stored.
        samples (int | None): draws.
        computed_in (str): the dtype in which the teacher ran.
        positions (str): which tokens are stored, one of :data:`POSITIONS`.
        width (int): D.
        vocab (int): V.
        has_bias (bool): whether the head has one.
        teacher (dict[str, Any]): its identity, as a checkpoint's manifest holds it.
        tokenizer (dict[str, Any]): the same of the tokenizer.
        documents (int): how many there are.
        tokens (int): stored tokens.
        error (dict[str, float]): of what is stored, see :mod:`torchtune_kd.cache_teacher.error`.
        versions (dict[str, str]): of the packages.
        written_at (str): ISO 8601, UTC.
        index (str): name of the index.
        files (dict[str, dict[str, Any]]): ``bytes`` and ``sha256`` of every file.
    """

    kind: str
    dtype: str | None
    k: int | None
    temperatures: list[float]
    samples: int | None
    computed_in: str
    positions: str
    width: int
    vocab: int
    has_bias: bool
    teacher: dict[str, Any]
    tokenizer: dict[str, Any]
    documents: int
    tokens: int
    error: dict[str, float]
    versions: dict[str, str]
    written_at: str
    index: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it, whole at any moment, with a checksum over all fields."""
        write_text(folder / NAME, manifest_text(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "CacheManifest":
        """Read the manifest in ``folder``, and look at the sizes of all files that it names.

        Raises:
            UserError: for a folder that is no cache, cannot be read, is unfinished, or lacks a file or a part of one.
        """
        again = "run `tune run torchtune_kd/cache_teacher` with the same config again, which writes what is missing"
        try:
            names = os.listdir(folder)
            if SHARDS in names and NAME not in names:
                raise UserError(f"The cache in {folder} is unfinished, it has no {NAME}: {again}.")
            manifest = cls(**read_manifest(folder, {each.name for each in fields(cls)}, FORMAT))
            for name, expected in manifest.files.items():
                check_size(folder, name, expected)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"Expected `teacher_cache` to be a folder that torchtune_kd/cache_teacher wrote, but {folder} is none: "
                "correct the path, or write the cache first."
            ) from error
        except Damaged as error:
            raise UserError(f"The cache in {folder} cannot be used, {error}: {again}.") from error
        except OSError as error:
            raise UserError(
                f"The cache in {folder} cannot be read ({first_line(error)}): see that its disk is there, and that "
                "this user may read it."
            ) from error
        return manifest

    @property
    def shards(self) -> list[str]:
        """Return the names of the shards, in the order in which the index numbers them."""
        return shards_of(self.files)

    @property
    def columns(self) -> Mapping[str, tuple[torch.dtype, int | None]]:
        """Return each column's dtype and width: None for one number a token, and for ids the most a shard may have."""
        wide, entropy = (self.k or 0) + 1, {"entropy": (torch.float32, None)}
        if self.kind == "sampled":
            return {"ids": (torch.int32, self.samples), "counts": (torch.uint8, self.samples), **entropy}
        if self.kind == "top_k":
            tail = (torch.float32, max(1, len(self.temperatures)))  # one, unknown, where none was imported
            found = {"ids": (torch.int32, wide), "log_probs": (torch.float16, wide), "tail": tail}
            return {**found, **entropy} if self.has_entropy else found
        if self.dtype == "int8":
            return {"states": (torch.int8, self.width), "scale": (torch.float16, None)}
        return {"states": (states.FLOATS[str(self.dtype)], self.width)}

    @property
    def as_teacher(self) -> dict[str, Any]:
        """Return the teacher's part of a run's identity."""
        return {**self.teacher, "signal of the teacher": f"{self.stored} from a cache, computed in {self.computed_in}"}

    @property
    def stored(self) -> str:
        """Say what is stored of a token."""
        if self.kind == "hidden":
            return f"hidden states in {self.dtype}"
        return f"{self.samples} drawn ids" if self.kind == "sampled" else f"the {self.k} likeliest ids"

    @property
    def remedy(self) -> str:
        """Say what makes a cache whole that is not."""
        if IMPORTED in self.teacher:
            return "import it again by `python -m torchtune_kd.tools.import_cache`"
        return "delete that file and run `tune run torchtune_kd/cache_teacher` again, which writes what is missing"

    @property
    def has_entropy(self) -> bool:
        """Return whether the whole teacher's entropy is stored, or follows: other projects do not store it."""
        return self.kind == "hidden" or IMPORTED not in self.teacher

    @property
    def bytes_per_token(self) -> int:
        """Return what is read of a token; of drawn ids the most."""
        if self.kind == "hidden":
            return states.bytes_per_token(str(self.dtype), self.width)
        return log_probs.bytes_per_token(self.kind, self.k, self.temperatures, self.samples)


def shards_of(files: Iterable[str]) -> list[str]:
    """Return the names of the shards among a cache's files, in the order in which an index numbers them."""
    return sorted(Path(name).name for name in files if Path(name).parent.name == SHARDS)


def to_be_written(head: tuple[int, int], *, has_bias: bool) -> CacheManifest:
    """Return the manifest of an empty cache of hidden states in bf16, for a teacher whose head is [V, D]."""
    return CacheManifest(
        kind="hidden", dtype="bf16", k=None, temperatures=[], samples=None, computed_in="bf16", positions="labels",
        width=head[1], vocab=head[0], has_bias=has_bias, teacher={}, tokenizer={}, documents=0, tokens=0, error={},
        versions={}, written_at="", index="",
    )  # fmt: skip
