"""The output folder of many requests, and its manifest, which lists the pictures that are complete.

A picture is written first, then its line is added to the manifest. So every picture with a line is complete, even after
a crash. A picture without a line is drawn again under the same name, because the request, or its row, determines it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inkstream.disk import PART, take, whole_file
from inkstream.engine.pictures.inputs import read_source
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.types import InputError, Request

NAME = "manifest.jsonl"
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Wanted:
    """One picture to draw: picture `index` of a row. Its request draws only this picture, with its seed."""

    row: int
    index: int
    request: Request
    digest: str  # of the request
    file: str  # its name in the folder
    named: bool = False  # the user chose the name; else the name has the digest

    @property
    def key(self) -> tuple[int, int]:
        return self.row, self.index


class Manifest:
    """The pictures of one folder, with one line of JSON for each. The folder is locked until `close`.

    Raises InputError if the folder cannot be written to, or if another process draws into it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / NAME
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            refusal = f"another run draws into {folder}: wait until it ends, or give another --out"
            self._lock = take(folder / ".lock", refusal)
            for part in folder.glob(f".*{PART}"):  # left by a killed process
                part.unlink()
            self._lines = {(line["row"], line["index"]): line for line in read_lines(self.path)}
        self._log = None

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._lock.close()

    def missing(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Return the pictures that are not there, are damaged, or belong to another request.

        Their lines are removed from the manifest. Lines of rows that are not in `wanted` stay.
        """
        found = [one for one in wanted if not self._holds(one)]
        for one in found:
            self._lines.pop(one.key, None)
        lines = sorted(self._lines.values(), key=lambda line: (line["row"], line["index"]))
        with self._writing():
            self._write(NAME, b"".join(map(_encode, lines)))
            self._log = self.path.open("ab", buffering=0)
        return found

    def changed(self, one: Wanted) -> bool:
        """Whether the row's picture belongs to another request. Call it before `missing`."""
        line = self._lines.get(one.key)
        return line is not None and "file" in line and line["digest"] != one.digest

    def add(
        self, one: Wanted, data: bytes, seconds: float, seed: int | None, facts: Mapping[str, Any] = NOTHING
    ) -> Path:
        """Save a finished picture and its line, with further facts. Both are on disk (fsync) when this returns.

        If another picture has the name that the user chose, that picture gets its own hash behind its name.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        with self._writing():
            old = self.folder / one.file
            if one.named and old.exists() and (mark := hashlib.sha256(old.read_bytes()).hexdigest()) != sha256:
                old.rename(old.with_name(f"{old.stem}-{mark[:6]}{old.suffix}"))
            path = self._write(one.file, data)
        self._append(one, {"file": one.file, "seed": seed, "sha256": sha256, "seconds": round(seconds, 3), **facts})
        return path

    def fail(self, one: Wanted, error: str, facts: Mapping[str, Any] = NOTHING) -> None:
        """Add a line for a picture that could not be drawn. It is missing, unless the facts say that it is `final`."""
        self._append(one, {"error": error, **facts})

    def _holds(self, one: Wanted) -> bool:
        line = self._lines.get(one.key)
        if line is not None and line.get("final") and line["digest"] == one.digest:
            return True
        if line is None or "file" not in line or line["digest"] != one.digest:
            return False
        with suppress(OSError):
            return hashlib.sha256((self.folder / line["file"]).read_bytes()).hexdigest() == line["sha256"]
        return False

    def _append(self, one: Wanted, facts: dict[str, Any]) -> None:
        assert self._log is not None, "call `missing` first"
        with self._writing():
            self._log.write(_encode({"row": one.row, "index": one.index, "digest": one.digest, **facts}))
            os.fsync(self._log.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an OSError into an InputError: the folder cannot be written to, or the disk is full."""
        try:
            yield
        except OSError as error:
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "a file is in the way" if in_the_way else error.strerror
            raise InputError(
                f"{self.folder} cannot be written to ({reason}): make room, or give another --out"
            ) from None

    def _write(self, name: str, data: bytes) -> Path:
        """Write a file atomically: a reader finds the old content or the new."""
        path = self.folder / name
        with whole_file(path, flush=True) as part:
            part.write_bytes(data)
        return path


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a manifest. A killed process may leave an incomplete last line."""
    with suppress(FileNotFoundError):
        for text in path.read_bytes().splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and {"row", "index", "digest"} <= line.keys():
                    yield line


def digest(request: Request) -> str:
    """Return a hash of a request, and of the content of its input pictures. Equal requests have equal hashes."""
    fields = request.model_dump(mode="json", exclude_defaults=True)
    for name in PICTURE_FIELDS:
        if name in fields:
            given = fields[name]
            fields[name] = [_digest_of(source) for source in ([given] if isinstance(given, str) else given)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of(source: str) -> str:
    return hashlib.sha256(read_source(source)).hexdigest()


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
