"""Jobs, pictures and uploads: rows in one SQLite file, and the picture files. They survive the death of any process.

Only the server's event loop writes rows, through one connection. Searches read from threads through a second one. A
picture's file is moved to its place before its row is committed, so every row has its file. A file without a row, after
a crash or next to an older database, gets a row at the next start. Only pictures that a user deleted are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from inkstream.disk import PART, take, whole_file
from inkstream.serve.errors import is_broken
from inkstream.serve.queue.damage import is_sound, picture_facts, salvage, set_aside, upload_facts
from inkstream.types import InputError

VERSION = 1
WEEK = 7 * 86_400.0
"""Seconds for which a deleted picture can be restored and an unused upload is kept."""

START_ROOM = 1 << 20
"""Bytes of free disk space that a start needs."""
log = logging.getLogger("inkstream.serve")

LATE = 60.0
"""Seconds after which the operating system has certainly written a file to the disk."""

TABLES = """
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  key TEXT NOT NULL,
  state TEXT NOT NULL,
  created REAL NOT NULL,
  started REAL,
  ended REAL,
  priority INTEGER NOT NULL,
  place REAL NOT NULL,
  model TEXT NOT NULL,
  total INTEGER NOT NULL,
  note TEXT NOT NULL,
  waited INTEGER NOT NULL,
  deaths INTEGER NOT NULL DEFAULT 0,
  token TEXT,
  digest TEXT NOT NULL,
  grid TEXT,
  error TEXT,
  remarks TEXT NOT NULL DEFAULT '[]',
  request TEXT NOT NULL
);
CREATE UNIQUE INDEX jobs_token ON jobs(key, token) WHERE token IS NOT NULL;
CREATE INDEX jobs_state ON jobs(state, number);

CREATE TABLE pictures (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  job TEXT NOT NULL,
  place INTEGER NOT NULL,
  key TEXT NOT NULL,
  created REAL NOT NULL,
  seconds REAL NOT NULL,
  width INTEGER NOT NULL,
  height INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  type TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  file TEXT NOT NULL,
  seed INTEGER NOT NULL,
  model TEXT NOT NULL,
  favourite INTEGER NOT NULL DEFAULT 0,
  deleted REAL,
  words TEXT NOT NULL,
  request TEXT NOT NULL,
  UNIQUE (job, place)
);
CREATE INDEX pictures_sha256 ON pictures(sha256);
CREATE INDEX pictures_search ON pictures(number, key, deleted, favourite, model, seed, created, words);

CREATE TABLE uploads (
  id TEXT PRIMARY KEY,
  key TEXT NOT NULL,
  created REAL NOT NULL,
  width INTEGER NOT NULL,
  height INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  type TEXT NOT NULL,
  file TEXT NOT NULL
);
CREATE TABLE used (
  upload TEXT NOT NULL,
  job TEXT NOT NULL,
  PRIMARY KEY (upload, job)
) WITHOUT ROWID;

CREATE TABLE usage (
  key TEXT NOT NULL,
  day INTEGER NOT NULL,
  pictures INTEGER NOT NULL,
  seconds REAL NOT NULL,
  PRIMARY KEY (key, day)
) WITHOUT ROWID;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Job:
    """A row of the queue and the history. `request` refers to pictures as `upload:ID` and always has a seed."""

    number: int
    id: str
    key: str
    state: str
    created: float
    started: float | None
    ended: float | None
    priority: int
    place: float  # order among the jobs of one key
    model: str
    total: int  # number of pictures of the complete job
    note: str
    waited: int  # 1: nobody needs it once its client has left
    deaths: int  # deaths of the engine during this job since its last picture
    token: str | None  # the client's idempotency key
    digest: str  # hash of the body: another body with the same token is refused
    grid: dict[str, Any] | None
    error: dict[str, Any] | None
    remarks: list[str]
    request: dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A row of the gallery; `place` is its index in its job."""

    number: int
    id: str
    job: str
    place: int
    key: str
    created: float
    seconds: float
    width: int
    height: int
    bytes: int
    type: str
    sha256: str
    file: str  # path below the folder `pictures`
    seed: int
    model: str
    favourite: int
    deleted: float | None
    words: str  # text that a search looks in
    request: dict[str, Any]


@dataclass(frozen=True)
class Upload:
    """A row for an uploaded picture. Its id depends on the key and the content."""

    id: str
    key: str
    created: float
    width: int
    height: int
    bytes: int
    type: str
    file: str


@dataclass(frozen=True)
class Search:
    """Conditions of a search in the gallery. Each word of `text` must occur; upper and lower case are the same."""

    key: str | None = None  # None: pictures of all keys
    text: str = ""
    model: str | None = None
    seed: int | None = None
    since: float | None = None
    until: float | None = None
    favourite: bool | None = None
    deleted: bool = False


AS_JSON = frozenset({"grid", "error", "remarks", "request"})
JSON_IN = {"jobs": "grid, error, remarks, request", "pictures": "request"}
TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "AVIF": "image/avif",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
    "PPM": "image/x-portable-pixmap",
    "JPEG2000": "image/jp2",
}
"""Pillow's name of a format -> media type of an upload."""
NAME = re.compile(r"p[0-9a-f]{20}")
"""A picture's id."""
JOB, PICTURE, UPLOAD = (", ".join(field.name for field in fields(row)) for row in (Job, Picture, Upload))


def _read(kind: Any, row: Sequence[Any]) -> Any:
    values = {
        field.name: json.loads(value) if field.name in AS_JSON and value is not None else value
        for field, value in zip(fields(kind), row)
    }
    return kind(**values)


def new_job_id() -> str:
    """A random id for a job, which nobody can guess."""
    return "j" + secrets.token_hex(10)


def picture_id(job: str, place: int) -> str:
    """The id of a job's picture, made from the job's id. Nobody can guess it without the job's id.

    A file is named after its picture's id, so a file without a row can be matched to its job and place.
    """
    return "p" + hashlib.sha256(f"{job} {place}".encode()).hexdigest()[:20]


def upload_id(key: str, data: bytes) -> str:
    """The id of an upload: the same key and bytes give the same id."""
    return "u" + hashlib.sha256(key.encode() + b"\0" + data).hexdigest()[:32]


class Store:
    """The data folder of a server. Only one server at a time can open it.

    Raises InputError if another server has it, a newer version wrote it, or it cannot be used.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pictures = folder / "pictures"
        self.thumbnails = folder / "thumbnails"
        self.uploads = folder / "uploads"
        self.parts = folder / "parts"  # files being written
        try:
            for place in (folder, self.pictures, self.thumbnails, self.uploads):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
            busy = f"{folder} is in use by another server: stop it, or give another --data"
            self._lock = take(folder / "lock", busy)
            try:
                if self.free() < START_ROOM:
                    raise InputError(f"the disk of {folder} is full: free some space, or give another --data")
                self._db = self._open_sound(folder / "inkstream.db")
                self._reader = _open(folder / "inkstream.db")
                self._log = (folder / "inkstream.db-wal").open("rb+", buffering=0)
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise InputError(f"{folder} is not writable ({error.strerror}): give another --data") from None
        except sqlite3.Error as error:
            raise InputError(f"{folder}/inkstream.db cannot be used ({error}): give another --data") from None
        self._reading = threading.Lock()

    def _open_sound(self, path: Path) -> sqlite3.Connection:
        """Open the database, or make it. A damaged one is kept under another name and its readable rows are copied."""
        try:
            db = _open(path)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise InputError(f"{self.folder} was written by a newer inkstream: upgrade, or give another --data")
            if version == 0:
                _make(db)
            if is_sound(db, JSON_IN):
                return db
            db.close()
        except sqlite3.DatabaseError as error:
            if not is_broken(error):
                raise
        aside = set_aside(path, time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
        new = path.with_name("inkstream-new.db")
        for old in (new, Path(f"{new}-wal")):  # left by a start that was interrupted here
            old.unlink(missing_ok=True)
        with closing(_open(new)) as db:
            _make(db)
            counts = salvage(aside, db, JSON_IN)
        for end in ("-wal", "-shm"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        os.replace(new, path)
        copied = ", ".join(f"{count} {table}" for table, count in counts.items())
        log.warning(f"inkstream.db was damaged: it is kept as {aside.name}; these rows were copied from it: {copied}")
        return _open(path)

    def close(self) -> None:
        for one in (self._log, self._reader, self._db, self._lock):
            one.close()

    # Jobs -----------------------------------------------------------------------------------------------------------

    def add_job(
        self,
        *,
        key: str,
        now: float,
        request: Mapping[str, Any],
        total: int,
        priority: int = 0,
        note: str = "",
        grid: Mapping[str, Any] | None = None,
        token: str | None = None,
        digest: str = "",
        waited: bool = False,
        uploads: Iterable[str] = (),
    ) -> Job:
        """Add a queued job. It survives the crash of any process, and after `settle` a crash of the machine."""
        identity = new_job_id()
        with self._change() as db:
            number = db.execute(
                "INSERT INTO jobs (id, key, state, created, priority, place, model, total, note, waited, token,"
                " digest, grid, request) VALUES (?, ?, 'queued', ?, ?,"
                " 1 + coalesce((SELECT max(place) FROM jobs), 0), ?, ?, ?, ?, ?, ?, ?, ?)",
                (identity, key, now, priority, request["model"], total, note, waited, token, digest,
                 None if grid is None else json.dumps(grid), json.dumps(request)),
            ).lastrowid  # fmt: skip
            db.executemany("INSERT OR IGNORE INTO used VALUES (?, ?)", [(upload, identity) for upload in uploads])
        return self._one(Job, "number = ?", number)

    def job(self, identity: str, key: str | None = None) -> Job | None:
        """The job with that id. None if it does not exist or belongs to another key. key: None for any key."""
        return self._one(Job, "id = ? AND (? IS NULL OR key = ?)", identity, key, key)

    def repeated(self, key: str, token: str) -> Job | None:
        """The job that was sent before with this key and idempotency key."""
        return self._one(Job, "key = ? AND token = ?", key, token)

    def active(self) -> list[Job]:
        """Jobs that are queued or running, oldest first."""
        return self._all(Job, "state IN ('queued', 'running') ORDER BY number")

    def list_jobs(self, key: str | None, state: str | None, before: int | None, limit: int) -> list[Job]:
        """Jobs, newest first. key, state: None for all. before: only jobs with a smaller number."""
        return self._all(
            Job,
            "(? IS NULL OR key = ?) AND (? IS NULL OR state = ?) AND number < ? ORDER BY number DESC LIMIT ?",
            key, key, state, state, 2**62 if before is None else before, limit,
        )  # fmt: skip

    def start(self, identity: str, now: float) -> bool:
        """Change a job from queued to running. False if it was not queued."""
        sql = "UPDATE jobs SET state = 'running', started = ? WHERE id = ? AND state = 'queued'"
        return self._set(sql, now, identity)

    def requeue(self, identity: str, died: bool) -> bool:
        """Change a job from running to queued, at its old place. died: count one death of the engine."""
        sql = (
            "UPDATE jobs SET state = 'queued', started = NULL, ended = NULL, deaths = deaths + ?"
            " WHERE id = ? AND state = 'running'"
        )
        return self._set(sql, int(died), identity)

    def end(self, identity: str, state: str, now: float, error: Mapping[str, Any] | None = None) -> bool:
        """Change a job from queued or running to succeeded, failed or cancelled. False if it has ended before."""
        sql = "UPDATE jobs SET state = ?, ended = ?, error = ? WHERE id = ? AND state IN ('queued', 'running')"
        return self._set(sql, state, now, None if error is None else json.dumps(error), identity)

    def move(self, identity: str, priority: int, place: float) -> bool:
        """Change the priority and the place of a queued job. False if it is not queued."""
        sql = "UPDATE jobs SET priority = ?, place = ? WHERE id = ? AND state = 'queued'"
        return self._set(sql, priority, place, identity)

    def remark(self, identity: str, remarks: Sequence[str]) -> None:
        self._set("UPDATE jobs SET remarks = ? WHERE id = ?", json.dumps(remarks), identity)

    # Pictures -------------------------------------------------------------------------------------------------------

    def add_picture(self, job: Job, place: int, now: float, part: Path, facts: Mapping[str, Any]) -> Picture | None:
        """Move a finished file to its place and add its row.

        If the job is not running or already has that picture, the file is removed and the result is None. facts:
        seconds, width, height, bytes, sha256 and the complete request.
        """
        identity = picture_id(job.id, place)
        file = f"{time_folder(now)}/{identity}.png"
        (self.pictures / file).parent.mkdir(exist_ok=True)
        with self._change() as db:
            running = db.execute("SELECT 1 FROM jobs WHERE id = ? AND state = 'running'", (job.id,)).fetchone()
            added = running is not None and self._insert_picture(identity, job.id, place, job.key, now, file, facts)
            if added:
                db.execute("UPDATE jobs SET deaths = 0 WHERE id = ?", (job.id,))
                db.execute(
                    "INSERT INTO usage VALUES (?, ?, 1, ?) ON CONFLICT DO UPDATE SET"
                    " pictures = pictures + 1, seconds = seconds + excluded.seconds",
                    (job.key, int(now // 86_400), facts["seconds"]),
                )
                os.replace(part, self.pictures / file)
        if not added:
            part.unlink(missing_ok=True)
            return None
        return self.picture(identity)

    def _insert_picture(
        self, identity: str, job: str, place: int, key: str, created: float, file: str, facts: Mapping[str, Any]
    ) -> bool:
        """Add a picture's row. False if it exists."""
        request = facts["request"]
        lines = (request.get("prompt", ""), request.get("negative_prompt", ""), request["model"], str(request["seed"]))
        sql = (
            "INSERT OR IGNORE INTO pictures (id, job, place, key, created, seconds, width, height, bytes, type,"
            " sha256, file, seed, model, words, request)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'image/png', ?, ?, ?, ?, ?, ?)"
        )
        return self._set(
            sql, identity, job, place, key, created, facts["seconds"], facts["width"], facts["height"], facts["bytes"],
            facts["sha256"], file, request["seed"], request["model"], "\n".join(lines).casefold(), json.dumps(request),
        )  # fmt: skip

    def picture(self, identity: str, key: str | None = None) -> Picture | None:
        return self._one(Picture, "id = ? AND (? IS NULL OR key = ?)", identity, key, key)

    def pictures_of(self, job: str) -> list[Picture]:
        """A job's pictures in order, deleted ones included."""
        return self._all(Picture, "job = ? ORDER BY place", job)

    def recent(self, limit: int) -> list[Picture]:
        """The latest pictures with a known drawing time, of all keys."""
        return self._all(Picture, "seconds > 0 AND number > (SELECT coalesce(max(number), 0) FROM pictures) - ?", limit)

    def with_content(self, sha256: str, key: str | None) -> Picture | None:
        """A picture of the key whose file has this SHA-256. key: None for any key."""
        return self._one(Picture, "sha256 = ? AND (? IS NULL OR key = ?)", sha256, key, key)

    def mark(self, identity: str, favourite: bool | None, deleted: float | None, undelete: bool = False) -> None:
        """Set or clear the favourite mark; set the time of deletion, or clear it with `undelete`."""
        if favourite is not None:
            self._set("UPDATE pictures SET favourite = ? WHERE id = ?", favourite, identity)
        if undelete:
            self._set("UPDATE pictures SET deleted = NULL WHERE id = ?", identity)
        elif deleted is not None:
            self._set("UPDATE pictures SET deleted = ? WHERE id = ? AND deleted IS NULL", deleted, identity)

    def search(self, wanted: Search, before: int | None, limit: int, offset: int = 0) -> tuple[list[Picture], int]:
        """One page of matching pictures, newest first, and the number of matches on all pages.

        before: only pictures with a smaller number. offset: skip so many of these. Call it in a thread: it reads the
        index of all pictures.
        """
        conditions, values = _conditions(wanted)
        found = f"SELECT number FROM pictures WHERE {conditions} AND number < ? ORDER BY number DESC LIMIT ? OFFSET ?"
        with self._reading:
            total = self._reader.execute(f"SELECT count(*) FROM pictures WHERE {conditions}", values).fetchone()[0]
            rows = self._reader.execute(  # the inner query uses only the index; whole rows are read only for the page
                f"SELECT {PICTURE} FROM pictures WHERE number IN ({found}) ORDER BY number DESC",
                (*values, 2**62 if before is None else before, limit, offset),
            ).fetchall()
        return [_read(Picture, row) for row in rows], total

    # Uploads --------------------------------------------------------------------------------------------------------

    def add_upload(self, upload: Upload, data: bytes) -> None:
        """Store an uploaded picture. If it exists, only its time is updated."""
        path = self.uploads / upload.file
        if not path.exists() or path.stat().st_size != len(data):
            with whole_file(path) as part:
                part.write_bytes(data)
        self._put_upload(upload)

    def _put_upload(self, upload: Upload) -> None:
        values = [getattr(upload, field.name) for field in fields(Upload)]
        self._set(f"INSERT OR REPLACE INTO uploads ({UPLOAD}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *values)

    def upload(self, identity: str, key: str | None = None) -> Upload | None:
        return self._one(Upload, "id = ? AND (? IS NULL OR key = ?)", identity, key, key)

    def uploaded(self, key: str) -> int:
        """Bytes of all uploads of a key."""
        return self._db.execute("SELECT coalesce(sum(bytes), 0) FROM uploads WHERE key = ?", (key,)).fetchone()[0]

    # Other ----------------------------------------------------------------------------------------------------------

    def drawn_today(self, key: str, now: float) -> int:
        """Number of pictures that were drawn for a key today (UTC), deleted ones included."""
        sql = "SELECT pictures FROM usage WHERE key = ? AND day = ?"
        row = self._db.execute(sql, (key, int(now // 86_400))).fetchone()
        return row[0] if row else 0

    def settle(self) -> None:
        """Flush all changes to the disk. Takes milliseconds: call it in a thread."""
        os.fsync(self._log.fileno())

    def free(self) -> int:
        """Free bytes of the disk. Raises OSError if the folder does not exist."""
        return shutil.disk_usage(self.folder).free

    def setting(self, name: str, default: str = "") -> str:
        row = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return row[0] if row else default

    def put_setting(self, name: str, value: str) -> None:
        self._set("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, value)

    def recover(self, now: float) -> list[Job]:
        """Clean up after the previous server, and return the waiting jobs, oldest first.

        Running jobs are queued again; a job that has all its pictures has succeeded. Jobs whose client waited for the
        answer are cancelled, because the client is gone. After a loss of power, rows whose file did not reach the disk
        are removed, and these pictures are drawn again. Files without a row get one.
        """
        shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir(mode=0o700)
        late = "created > (SELECT max(created) FROM pictures) - ? AND deleted IS NULL"
        for picture in self._all(Picture, late, LATE):
            if not _is_whole(self.pictures / picture.file, picture):
                self._set("DELETE FROM pictures WHERE id = ?", picture.id)
                self._set("UPDATE jobs SET state = 'running' WHERE id = ? AND state = 'succeeded'", picture.job)
        self._find_pictures()
        self._find_uploads(now)
        for job in self.active():
            if job.waited:
                self.end(job.id, "cancelled", now)
            elif len(self.pictures_of(job.id)) >= job.total:
                self.end(job.id, "succeeded", now)
            elif job.state == "running":
                self.requeue(job.id, died=False)
        self.tidy(now)
        return self.active()

    def _find_pictures(self) -> None:
        """Add a row for each picture file that has none.

        The row gets the file's job, or a new job id if the job is unknown. A file that is broken or not from inkstream
        stays where it is.
        """
        known = {row[0] for row in self._db.execute("SELECT file FROM pictures")}
        strays = {
            file.stem: file
            for file in self.pictures.glob("*/p*.png")
            if NAME.fullmatch(file.stem) and f"{file.parent.name}/{file.name}" not in known
        }
        if not strays:
            return
        places = {
            picture_id(job, place): (job, place, key)
            for job, key, total in self._db.execute("SELECT id, key, total FROM jobs")
            for place in range(total)
        }
        found = 0
        for identity, path in sorted(strays.items(), key=lambda stray: stray[1].stat().st_mtime):
            file = f"{path.parent.name}/{path.name}"
            try:
                facts = picture_facts(path)
            except (InputError, OSError) as error:
                log.warning(
                    "a file is not a picture of this server: ignored", extra={"file": path.name, "error": error}
                )
                continue
            job, place, key = places.get(identity, ("j" + identity[1:], 0, ""))
            found += self._insert_picture(identity, job, place, key, path.stat().st_mtime, file, facts)
        log.warning("added rows for pictures that had none", extra={"pictures": found})

    def _find_uploads(self, now: float) -> None:
        """Add a row for each upload file that has none.

        The file's name is a hash of key and content. The key is found if a row of a job or an upload has it.
        """
        known = {row[0] for row in self._db.execute("SELECT file FROM uploads")}
        keys = {row[0] for row in self._db.execute("SELECT key FROM jobs UNION SELECT key FROM uploads")}
        for path in self.uploads.glob("u*"):
            if path.suffix == PART:
                path.unlink(missing_ok=True)
            elif path.name not in known:
                try:
                    width, height, kind = upload_facts(path)
                except InputError as error:
                    log.warning("a file is not an upload: ignored", extra={"file": path.name, "error": error})
                    continue
                data = path.read_bytes()
                key = next((key for key in keys if upload_id(key, data) == path.stem), "")
                media = TYPES.get(kind, "application/octet-stream")
                self._put_upload(Upload(path.stem, key, now, width, height, len(data), media, path.name))

    def tidy(self, now: float) -> None:
        """Remove pictures that were deleted more than a week ago, and unused uploads that are older than a week."""
        gone = self._all(Picture, "deleted < ?", now - WEEK)
        idle = self._all(Upload, "created < ? AND id NOT IN (SELECT upload FROM used)", now - WEEK)
        for picture in gone:  # files first: a file without a row would get one at the next start
            (self.pictures / picture.file).unlink(missing_ok=True)
            self.thumbnail_of(picture).unlink(missing_ok=True)
        for upload in idle:
            (self.uploads / upload.file).unlink(missing_ok=True)
        with self._change() as db:
            db.executemany("DELETE FROM pictures WHERE id = ?", [(picture.id,) for picture in gone])
            db.executemany("DELETE FROM uploads WHERE id = ?", [(upload.id,) for upload in idle])

    def thumbnail_of(self, picture: Picture) -> Path:
        """Path of the picture's thumbnail, whether it exists or not."""
        return self.thumbnails / f"{picture.id}.webp"

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all changes in the block are written, or none."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")  # if it fails, the transaction stays open and needs the ROLLBACK
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _set(self, sql: str, *values: Any) -> bool:
        return self._db.execute(sql, values).rowcount > 0

    def _one(self, kind: Any, condition: str, *values: Any) -> Any:
        return next(iter(self._all(kind, f"{condition} LIMIT 1", *values)), None)

    def _all(self, kind: Any, condition: str, *values: Any) -> list[Any]:
        table, columns = {Job: ("jobs", JOB), Picture: ("pictures", PICTURE), Upload: ("uploads", UPLOAD)}[kind]
        rows = self._db.execute(f"SELECT {columns} FROM {table} WHERE {condition}", values).fetchall()
        return [_read(kind, row) for row in rows]


def _is_whole(path: Path, picture: Picture) -> bool:
    """Whether a picture's file exists and has the SHA-256 of its row."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == picture.sha256
    except OSError:
        return False


def time_folder(now: float) -> str:
    """Name of the folder for pictures of that time, as in 2026-11."""
    return time.strftime("%Y-%m", time.gmtime(now))


def _conditions(wanted: Search) -> tuple[str, list[Any]]:
    """The WHERE clause of a search, and its values.

    It uses instr instead of FTS5: FTS5's trigrams do not find Chinese words of two characters.
    """
    pairs: list[tuple[str, Any]] = [
        ("key = ?", wanted.key),
        ("model = ?", wanted.model),
        ("seed = ?", wanted.seed),
        ("created >= ?", wanted.since),
        ("created < ?", wanted.until),
        ("favourite = ?", wanted.favourite),
        *(("instr(words, ?)", word) for word in wanted.text.casefold().split()[:20]),
    ]
    used = [(condition, value) for condition, value in pairs if value is not None]
    state = "deleted IS NOT NULL" if wanted.deleted else "deleted IS NULL"
    return " AND ".join([state, *(condition for condition, _ in used)]), [value for _, value in used]


def _make(db: sqlite3.Connection) -> None:
    db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT")


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db
