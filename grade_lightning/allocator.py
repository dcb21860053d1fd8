"""The C library's allocator: by default it gives large tensors back to the system, and asks for them again."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of malloc.h in glibc
PAD = 2**28
"""Bytes by which the heap grows beyond what is asked for."""


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next tensors of this process.

    Every large tensor is otherwise mapped anew, page by page, which takes a part of the time of a training pass on long
    sequences on a processor. The process holds its peak of memory until it ends, and the peak is somewhat higher. It is
    for glibc on Linux; elsewhere, and where the environment says how `malloc` works (`MALLOC_TRIM_THRESHOLD_` or
    another `MALLOC_…_`, `GLIBC_TUNABLES`), nothing is done. The commands call it where they run on a processor.

    Returns:
        Whether it was done.

    Example:
        >>> os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"  # the C library's own default: leave it as it is
        >>> keep_freed_memory()
        False
        >>> del os.environ["MALLOC_TRIM_THRESHOLD_"]
    """
    if not _is_glibc() or _is_set():
        return False
    library = ctypes.CDLL(None)
    settings = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, PAD)
    return all(library.mallopt(*setting) == 1 for setting in settings)


def _is_glibc() -> bool:
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):  # the name is known to Python, and not to another C library
        return False


def _is_set() -> bool:
    names = [name for name in os.environ if name.startswith("MALLOC_") and name.endswith("_")]
    return bool(names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
