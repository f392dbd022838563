"""A cache's folder, and what its manifest says.

    manifest.json            written last: a folder without one is unfinished
    head.safetensors         weight [V, D] and bias [V] of the teacher's head; channel_rms [D]
    index-<hash>.safetensors where each document lies, see :mod:`torchtune_kd.caches.index`
    shards/<hash>.safetensors rows of tokens, and a table of the documents in it

Shapes: V vocabulary, D hidden width of the teacher.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchtune_kd.errors import UserError
from torchtune_kd.storage.atomic import write_text
from torchtune_kd.storage.manifest import NAME, Damaged, check_size, manifest_text, read_manifest

FORMAT = 1
HEAD, SHARDS = "head.safetensors", "shards"
KINDS = ("hidden",)
DTYPES = ("fp32", "bf16", "fp16", "int8")
POSITIONS = ("labels", "all")


@dataclass
class CacheManifest:
    """Facts about a cache, readable with any editor.

    Attributes:
        kind (str): one of :data:`KINDS`.
        dtype (str): of the states, one of :data:`DTYPES`.
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
    dtype: str
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
            UserError: for a folder that is no cache, is unfinished, or lacks a file or a part of one.
        """
        again = "run `tune run torchtune_kd/cache_teacher` with the same config again, which writes what is missing"
        if not folder.is_dir():
            raise UserError(
                f"Expected `teacher_cache` to be a folder that torchtune_kd/cache_teacher wrote, but {folder} is none: "
                "correct the path, or write the cache first."
            )
        if (folder / SHARDS).is_dir() and not (folder / NAME).is_file():
            raise UserError(f"The cache in {folder} is unfinished, it has no {NAME}: {again}.")
        try:
            manifest = cls(**read_manifest(folder, {each.name for each in fields(cls)}, FORMAT))
            for name, expected in manifest.files.items():
                check_size(folder, name, expected)
        except Damaged as error:
            raise UserError(f"The cache in {folder} cannot be used, {error}: {again}.") from error
        return manifest

    @property
    def as_teacher(self) -> dict[str, Any]:
        """Return the teacher's part of a run's identity."""
        return {
            **self.teacher,
            "states of the teacher": f"from a cache in {self.dtype}, computed in {self.computed_in}",
        }
