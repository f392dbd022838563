"""Memory of a CPU that trains."""

import ctypes
import platform

# parameters of glibc's mallopt, from its malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_STEP = 256 * 2**20  # bytes that are asked of the kernel at once


def keep_freed_memory() -> bool:
    """Let this process keep what its tensors free, for the next ones.

    By default glibc gives every block above 32 MiB back to the kernel as soon as it is freed, such as a chunk of logits
    or the gradient of an embedding, and the kernel clears its pages anew for the next one: a quarter of a step's time
    on two cores. What is kept is at most what was in use at once, and holes between blocks.

    Returns:
        bool: whether the C library is one that can be told.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, _STEP)])
