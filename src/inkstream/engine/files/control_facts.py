"""What a control net's file says of itself: its header. Torch is not imported."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from inkstream.families.nets import NetFacts, facts_of
from inkstream.types import InputError
from inkstream.weights.header import read_raw_header


def read_net(file: Path) -> NetFacts:
    """Read what a file is for. An unchanged file is read once.

    Raises InputError, which names no folder, if the file is damaged or no control net that is known here.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise InputError(f"{file.name} cannot be read ({error.strerror})") from None
    found = _read(file, stat.st_mtime_ns, stat.st_size)
    if isinstance(found, str):
        raise InputError(found)
    return found


@lru_cache(maxsize=1024)
def _read(file: Path, changed: int, size: int) -> NetFacts | str:
    """The facts, or what is wrong. changed, size: those of the file, for the cache."""
    try:
        entries = read_raw_header(file).entries
    except InputError as error:
        return str(error).replace(str(file), file.name)
    found = facts_of({key: tuple(entry["shape"]) for key, entry in entries.items()})
    return found or f"{file.name} is not a control net that is known here: see docs/control.md"
