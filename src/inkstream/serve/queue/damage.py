"""After damage: the rows that a broken database still has, and what files without a row tell of themselves."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from inkstream.engine.pictures.inputs import decoding, open_header, short_name
from inkstream.engine.pictures.metadata import PICTURE_FIELDS, read_request
from inkstream.serve.errors import is_broken
from inkstream.types import InputError

HOLE = 10_000
"""Row numbers in a row that may be unreadable before a table's end is taken to be reached."""


def is_sound(db: sqlite3.Connection, as_json: Mapping[str, str]) -> bool:
    """Whether every page of a database is as SQLite wrote it, and the columns table -> "a, b" hold JSON or nothing."""
    try:
        if db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
            return False
        for table, columns in as_json.items():
            bad = " OR ".join(f"NOT {_valid(column)}" for column in columns.split(", "))
            if db.execute(f"SELECT EXISTS (SELECT 1 FROM {table} WHERE {bad})").fetchone()[0]:
                return False
    except sqlite3.DatabaseError as error:
        if is_broken(error):
            return False
        raise
    return True


def set_aside(path: Path, stamp: str) -> Path:
    """A copy of a database under another name, its log too, which nothing writes to again. OSError where none fits."""
    aside = path.with_name(f"{path.stem}-damaged-{stamp}{path.suffix}")
    try:
        for end in ("", "-wal"):
            if Path(f"{path}{end}").exists():
                shutil.copy2(f"{path}{end}", f"{aside}{end}")
    except OSError:
        for end in ("", "-wal"):
            Path(f"{aside}{end}").unlink(missing_ok=True)
        raise
    return aside


def salvage(broken: Path, db: sqlite3.Connection, as_json: Mapping[str, str]) -> dict[str, int]:
    """Copy every row that can be read out of a broken database into an empty one; how many, by table."""
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    counts = {}
    with closing(sqlite3.connect(broken, isolation_level=None)) as source:
        for table in (name for name in tables if not name.startswith("sqlite_")):
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            only = " AND ".join(
                _valid(f"?{columns.index(name) + 1}") for name in as_json.get(table, "").split(", ") if name
            )
            marks = ", ".join(f"?{place + 1}" for place in range(len(columns)))
            counts[table] = 0
            db.execute("BEGIN")
            for row in _rows(source, table, columns):
                with suppress(sqlite3.DatabaseError):  # a row that breaks a rule was not written by us
                    sql = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) SELECT {marks} WHERE {only or 1}"
                    counts[table] += db.execute(sql, row).rowcount
            db.execute("COMMIT")
    return counts


def picture_facts(path: Path) -> dict[str, Any]:
    """A picture's columns as its file tells them. InputError where it is broken or carries no request of ours."""
    found = read_request(path)
    request = found.request
    if found.source != "inkstream" or request.seed is None:
        raise InputError(f"{short_name(str(path))} carries no request of ours")
    data = path.read_bytes()
    with decoding(short_name(str(path))), Image.open(path) as image:
        width, height = image.size
        image.verify()  # every chunk to the last
    return {
        "seconds": 0.0,  # nobody knows
        "width": width,
        "height": height,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "request": request.model_dump(
            mode="json", include=request.model_fields_set | {"model"}, exclude=set(PICTURE_FIELDS), exclude_none=True
        ),
    }


def upload_facts(path: Path) -> tuple[int, int, str]:
    """Width, height and format of an upload's file. InputError where it is no picture."""
    image = open_header(str(path))
    return *image.size, image.format or "PNG"


def _valid(column: str) -> str:
    return f"({column} IS NULL OR json_valid({column}))"


def _rows(db: sqlite3.Connection, table: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """The rows of a table that can be read. By their numbers, past the holes; without numbers, from both ends."""
    listed = ", ".join(columns)
    try:
        db.execute(f"SELECT rowid FROM {table} LIMIT 0")
    except sqlite3.OperationalError:  # it has no numbers, or is not there
        for order in ("", f" ORDER BY {columns[0]} DESC"):
            with suppress(sqlite3.DatabaseError):
                yield from db.execute(f"SELECT {listed} FROM {table}{order}")
        return
    except sqlite3.DatabaseError:
        return  # not even its schema can be read
    last, missed = -1, 0
    while missed < HOLE and last < 2**63 - 1:
        try:
            for row in db.execute(f"SELECT rowid, {listed} FROM {table} WHERE rowid > ? ORDER BY rowid", (last,)):
                last, missed = max(last, row[0]), 0  # a damaged number may go backwards
                yield row[1:]
            return
        except sqlite3.DatabaseError:
            last, missed = last + 1, missed + 1
            # The cursor reads a row ahead, so a row beside a hole is read by its own number.
            with suppress(sqlite3.DatabaseError):
                for row in db.execute(f"SELECT {listed} FROM {table} WHERE rowid = ?", (last,)):
                    missed = 0
                    yield row
