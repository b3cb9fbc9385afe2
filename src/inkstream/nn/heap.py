"""Settings of glibc's heap: freed memory stays in the process for the next computation."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

LARGE = 32 * 2**20
"""Bytes from which glibc maps each block on its own and unmaps it when freed: the most that glibc accepts."""
KEPT = 128 * 2**20
"""Bytes of free memory that the process keeps."""


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, in one heap for all threads. Other C libraries have no such setting.

    One heap, because many threads take turns in drawing. By default glibc returns a forward's memory to the system at
    once, and the system clears every page again for the next forward. That took a sixth of the time of a forward of
    1500 tokens of Pocket.
    """
    if mallopt := _of_glibc("mallopt"):
        for parameter, value in ((-3, LARGE), (-1, KEPT), (-8, 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Returns free memory to the system. It takes a few milliseconds; the next computation allocates anew."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
