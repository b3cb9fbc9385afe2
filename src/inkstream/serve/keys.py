"""API keys and their limits. Only a scrypt hash of each key is stored."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inkstream.disk import whole_file
from inkstream.serve.errors import Refused
from inkstream.types import InputError

PREFIX = "ink"
COST = {"n": 1 << 14, "r": 8, "p": 1}
"""Parameters of scrypt (RFC 7914): one guess costs 16 MiB and about 50 ms."""
COOKIE = "inkstream_key"


@dataclass(frozen=True)
class Key:
    """A key as it is stored. A limit that is None does not limit anything."""

    name: str
    id: str  # the part of the key that identifies it; not secret
    salt: str
    hash: str
    created: float
    per_minute: float | None = None  # new jobs in a minute
    pictures_per_day: int | None = None
    queued: int | None = None  # waiting jobs at one time
    priority: int = 0  # highest priority that its jobs may have
    admin: bool = False  # sees the jobs of all keys, pauses the queue, reads the metrics


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    scope: name of the key whose jobs and pictures the caller sees; None for those of all keys. link: the caller has a
    signed link to one path instead of a key.
    """

    name: str
    scope: str | None
    key: Key | None = None
    link: bool = False

    @property
    def admin(self) -> bool:
        return not self.link and (self.key is None or self.key.admin)


ANYONE = Caller("", None)
"""The caller of a server without keys. Only this machine can reach such a server."""
LINK = Caller("", None, link=True)
"""The caller with a signed link."""


class Keys:
    """The keys in a file. A changed file is read again."""

    def __init__(self, path: Path):
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._required = False
        self._known: dict[bytes, Key] = {}  # digest of the text of a checked key -> the key
        self._checking = threading.Lock()  # only one guess at a time uses processor time
        self._buckets: dict[str, tuple[float, float]] = {}
        self._read()

    def __bool__(self) -> bool:
        """Whether requests need a key: true once there was one. Removing the last key does not open the server."""
        self._read()
        return self._required

    def all(self) -> list[Key]:
        self._read()
        return sorted(self._keys.values(), key=lambda key: key.name)

    def remembered(self, text: str) -> Key | None:
        """The key of a text that `check` accepted before, else None. Needs no scrypt."""
        self._read()
        return self._known.get(hashlib.sha256(text.encode()).digest())

    def holds(self, caller: Caller) -> bool:
        """Whether the caller's key still exists. True for a caller without a key."""
        self._read()
        return caller.key is None or self._keys.get(caller.key.id) == caller.key

    def check(self, text: str) -> Key | None:
        """The key of a text, or None if there is no such key. Takes about 50 ms: call it in a thread."""
        match = re.fullmatch(rf"{PREFIX}_([0-9a-f]{{8}})_([A-Za-z0-9_-]{{20,80}})", text)
        key = self._keys.get(match[1]) if match else None
        if match is None or key is None:
            return None
        with self._checking:
            right = hmac.compare_digest(_hash(match[2], key.salt), key.hash)
        if not right or self._keys.get(match[1]) != key:  # the key may have been removed during the check
            return None
        self._known[hashlib.sha256(text.encode()).digest()] = key
        return key

    def spend(self, key: Key, now: float) -> None:
        """Count one job against the key's rate limit, a token bucket.

        now: unix seconds. Raises Refused, with the seconds to wait, if the bucket is empty.
        """
        if key.per_minute is None:
            return
        size = max(1.0, key.per_minute)
        left, last = self._buckets.get(key.name, (size, now))
        left = min(size, left + (now - last) * key.per_minute / 60)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / key.per_minute - 1e-6)
            raise Refused(
                429,
                f"this key may start {key.per_minute:g} jobs a minute: try again in {wait} s",
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        self._buckets[key.name] = (left - 1, now)

    def _read(self) -> None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._keys, self._known = None, {}, {}
            return
        stamp = stat.st_mtime_ns, stat.st_size
        if stamp != self._stamp:
            self._keys = {key.id: key for key in read_keys(self.path)}
            self._known = {}
            self._required = self._required or bool(self._keys)
            self._stamp = stamp


def read_keys(path: Path) -> list[Key]:
    """The keys in a file; empty if there is no file. Raises InputError if the file is not a key file."""
    try:
        return [Key(**key) for key in json.loads(path.read_text("utf-8"))["keys"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a key file ({error}): give another --api-key-file") from None


def add_key(path: Path, name: str, now: float, **limits: Any) -> str:
    """Add a key to the file and return its text. The file holds only the hash of the text.

    limits: fields of Key. Raises InputError if the name is taken or not valid.
    """
    keys = read_keys(path)
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise InputError(f"{name!r} is not a valid key name: take at most 64 letters, digits, dots and dashes")
    if any(key.name == name for key in keys):
        raise InputError(f"there is already a key {name}: remove it first, or take another name")
    identity, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_hex(16)
    key = Key(name, identity, salt, _hash(secret, salt), now, **limits)
    _write(path, [*keys, key])
    return f"{PREFIX}_{identity}_{secret}"


def remove_key(path: Path, name: str) -> None:
    """Remove a key from the file. Raises InputError if there is no such key."""
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise InputError(f"there is no key {name}: the keys are {known}")
    _write(path, [key for key in keys if key.name != name])


def given_key(headers: Mapping[str, str], cookies: Mapping[str, str]) -> str | None:
    """The key of a request: from its bearer token, its password of basic authentication, or its cookie."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return cookies.get(COOKIE)


def sign(secret: str, path: str, until: int) -> str:
    """The signature that makes a path readable without a key. until: unix seconds."""
    return hmac.new(secret.encode(), f"{path}\n{until}".encode(), "sha256").hexdigest()


def is_signed(secret: str, path: str, until: str, signature: str, now: float) -> bool:
    """Whether `sign` made this signature and it has not expired."""
    if not until.isdecimal() or len(until) > 12 or int(until) < now:
        return False
    return hmac.compare_digest(sign(secret, path, int(until)).encode(), signature.encode())


def _hash(secret: str, salt: str) -> str:
    return hashlib.scrypt(secret.encode(), salt=bytes.fromhex(salt), dklen=32, maxmem=64 << 20, **COST).hex()


def _write(path: Path, keys: list[Key]) -> None:
    """Write the key file. Only its owner can read it. The file is replaced in one step, so it is never incomplete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_file(path) as part:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": 1, "keys": [asdict(key) for key in keys]}, file, indent=2)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): give another --api-key-file") from None
