"""Memory that was given back stays in the process for what is computed next."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

LARGE = 32 * 2**20
"""Bytes from which a block is the system's own, taken from it and given back each time: the most that glibc takes."""
KEPT = 128 * 2**20
"""Bytes of free memory that stay."""


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, in one heap for all threads, since many take turns in drawing. Only glibc
    can be told.

    Otherwise it returns a forward's memory as soon as it is free, and the system clears every page of it again for the
    next: a sixth of the time of a forward of 1500 tokens of Pocket.
    """
    if mallopt := _of_glibc("mallopt"):
        for parameter, value in ((-3, LARGE), (-1, KEPT), (-8, 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Let the system have what is free now: a few milliseconds, and what is computed next takes it anew."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
