"""Files and folders on disk: atomic writes, and a lock that allows one process at a time."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inkstream.types import InputError

PART = ".part"
"""The ending of temporary files and folders. Those that a killed process left behind may be removed."""


@contextmanager
def whole_file(path: Path, flush: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder. It is renamed to `path` at the end, or removed if an error occurs.

    So a reader finds the old file or the new one. flush: the data is on the disk (fsync) before the rename.
    """
    part = temporary(path)
    try:
        yield part
        if flush:
            flush_to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, flush: bool = False, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`. It is renamed to `path` at the end, or removed if an error occurs.

    flush: the folder and its files are on the disk (fsync) before the rename. replace: an existing folder is replaced;
    otherwise only an empty one is, and OSError is raised for any other, which stays as it is.
    """
    part = temporary(path)
    part.mkdir(parents=True)
    try:
        yield part
        if flush:
            for file in (*part.iterdir(), part):
                flush_to_disk(file)
        old = temporary(path)
        if path.exists():
            os.replace(path, old) if replace else path.rmdir()
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def temporary(path: Path) -> Path:
    """Return a new hidden name in the folder of `path`. It is short, as `path` may have the longest name possible."""
    return path.with_name(f".{secrets.token_hex(8)}{PART}")


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to disk (fsync). Without it, a rename may survive a crash while the data is lost."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def take(path: Path, refusal: str) -> sqlite3.Connection:
    """Take the lock file at `path` and return the connection that holds it.

    The lock is an open transaction on a SQLite database that has no other use. Closing the connection releases the
    lock, and so does the end of the process, even a crash. Raises InputError with the text `refusal` if another process
    holds the lock, and OSError if the file cannot be made.
    """
    path.touch()
    lock = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        lock.close()
        raise InputError(refusal) from None
    return lock
