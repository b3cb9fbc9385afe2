"""A folder that one process at a time may write to."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from inkstream.types import InputError


def take(path: Path, refusal: str) -> sqlite3.Connection:
    """A lock that ends with the process, however that ends: an open transaction on a database of its own.

    It holds until it is closed. InputError with `refusal` where another process has it, OSError where nobody could.
    """
    path.touch()
    lock = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        lock.close()
        raise InputError(refusal) from None
    return lock
