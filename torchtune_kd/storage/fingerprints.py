"""Fingerprints of files: by what is in them, not by where they lie."""

import hashlib
import itertools
from pathlib import Path

WHOLE = 64 * 2**20  # bytes up to which a file is read whole
STRIDE, BLOCK = 4 * 2**20, 16 * 2**10  # of a larger one: this much of every so much, and its end


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def files_fingerprint(paths: list[Path]) -> str:
    """Compute SHA-256 over sizes and contents; of files above :data:`WHOLE` over blocks spread through them."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                digest.update(file.read())
                continue
            for offset in itertools.chain(range(0, size - BLOCK, STRIDE), [size - BLOCK]):
                file.seek(offset)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
