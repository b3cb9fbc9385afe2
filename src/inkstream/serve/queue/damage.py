"""Repair after damage: reads the rows left in a broken database, and makes rows for files that have none."""

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
"""Number of consecutive unreadable row numbers after which a table counts as read to its end."""


def is_sound(db: sqlite3.Connection, as_json: Mapping[str, str]) -> bool:
    """Whether a database passes SQLite's integrity check and its JSON columns hold JSON or NULL.

    as_json: table -> its JSON columns, as in "a, b".
    """
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
    """Copy a database, and its WAL file if there is one, to `NAME-damaged-STAMP`, and return the path of the copy.

    SQLite may merge the copied WAL file into the copy when `salvage` reads it. Raises OSError if the disk is full.
    """
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
    """Copy every readable row of a broken database into an empty one, and return the number of rows for each table.

    as_json: table -> its JSON columns. Rows whose JSON is not valid are left out.
    """
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
                with suppress(sqlite3.DatabaseError):  # leave out a damaged row that violates a constraint
                    sql = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) SELECT {marks} WHERE {only or 1}"
                    counts[table] += db.execute(sql, row).rowcount
            db.execute("COMMIT")
    return counts


def picture_facts(path: Path) -> dict[str, Any]:
    """A picture's columns, read from its file. Raises InputError if the file is broken or not from inkstream."""
    found = read_request(path)
    request = found.request
    if found.source != "inkstream" or request.seed is None:
        raise InputError(f"{short_name(str(path))} has no request from inkstream in its metadata")
    data = path.read_bytes()
    with decoding(short_name(str(path))), Image.open(path) as image:
        width, height = image.size
        image.verify()  # checks all chunks
    return {
        "seconds": 0.0,  # unknown
        "width": width,
        "height": height,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "request": request.model_dump(
            mode="json", include=request.model_fields_set | {"model"}, exclude=set(PICTURE_FIELDS), exclude_none=True
        ),
    }


def upload_facts(path: Path) -> tuple[int, int, str]:
    """Width, height and format of an upload's file. Raises InputError if the file is not a picture."""
    image = open_header(str(path))
    return *image.size, image.format or "PNG"


def _valid(column: str) -> str:
    return f"({column} IS NULL OR json_valid({column}))"


def _rows(db: sqlite3.Connection, table: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """The readable rows of a table.

    A table with row numbers is read by number, so that damaged places can be skipped. A table without them is read from
    its start and from its end.
    """
    listed = ", ".join(columns)
    try:
        db.execute(f"SELECT rowid FROM {table} LIMIT 0")
    except sqlite3.OperationalError:  # the table has no row numbers or does not exist
        for order in ("", f" ORDER BY {columns[0]} DESC"):
            with suppress(sqlite3.DatabaseError):
                yield from db.execute(f"SELECT {listed} FROM {table}{order}")
        return
    except sqlite3.DatabaseError:
        return  # the schema is unreadable
    last, missed = -1, 0
    while missed < HOLE and last < 2**63 - 1:
        try:
            for row in db.execute(f"SELECT rowid, {listed} FROM {table} WHERE rowid > ? ORDER BY rowid", (last,)):
                last, missed = max(last, row[0]), 0  # a damaged row number may be smaller than the last one
                yield row[1:]
            return
        except sqlite3.DatabaseError:
            last, missed = last + 1, missed + 1
            # The cursor reads one row ahead, so a row next to a damaged one must be read by its own number.
            with suppress(sqlite3.DatabaseError):
                for row in db.execute(f"SELECT {listed} FROM {table} WHERE rowid = ?", (last,)):
                    missed = 0
                    yield row
