"""The C library's memory allocator, set up for large arrays that come and go."""

from __future__ import annotations

import ctypes
import sys

# glibc's numbers for mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGEST_KEPT = 256 << 20
MOST_KEPT = 512 << 20


def keep_freed_memory() -> None:
    """From now on this process keeps up to 512 MB of what it frees and uses it again.

    glibc otherwise asks the system for every array above some megabytes and gives it back: a forward pass of a network
    on a CPU spends a third of its time on fresh pages. One arena for all threads, because the others never hold large
    arrays. For the owner of a process, so commands call it and library functions do not. Nothing happens elsewhere
    than with glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # musl has no such function
    for name, value in ((MMAP_THRESHOLD, LARGEST_KEPT), (TRIM_THRESHOLD, MOST_KEPT), (ARENA_MAX, 1)):
        mallopt(name, value)
