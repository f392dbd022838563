"""A lock on a run's folder, held by whoever works on it, on any machine that sees the folder.

It is a lock of the kernel on an open file (flock), not a file that exists: when its holders are gone, killed ones
too, so is the lock. The program that trains inherits the open file: if only the sweep is killed, the run stays locked
until that program has ended, and no second one is started into its folder. filelock has no public name for the open
file.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[int | None]:
    """Yield a descriptor of the locked file, or None where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Wait for the lock, and hold it in the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
