"""Who may ask: keys, of which only a scrypt hash is kept, with what each may spend."""

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

from inkstream.serve.errors import Refused
from inkstream.types import InputError

PREFIX = "ink"
COST = {"n": 1 << 14, "r": 8, "p": 1}
"""Of scrypt (RFC 7914): 16 MiB and some 50 ms for a guess."""
COOKIE = "inkstream_key"


@dataclass(frozen=True)
class Key:
    """A key as it is kept. Limits of None are none."""

    name: str
    id: str  # the part of the key that finds it; no secret
    salt: str
    hash: str
    created: float
    per_minute: float | None = None  # jobs that may be asked for in a minute
    pictures_per_day: int | None = None
    queued: int | None = None  # jobs waiting at once
    priority: int = 0  # the highest it may give
    admin: bool = False  # sees every key's jobs, pauses the queue, reads the metrics


@dataclass(frozen=True)
class Caller:
    """Who asks. scope: whose things are shown, None everybody's. link: it holds a signed link, for one path."""

    name: str
    scope: str | None
    key: Key | None = None
    link: bool = False

    @property
    def admin(self) -> bool:
        return not self.link and (self.key is None or self.key.admin)


ANYONE = Caller("", None)
"""Whoever reaches a server without keys, which only this machine can."""
LINK = Caller("", None, link=True)
"""Whoever holds a signed link."""


class Keys:
    """The keys in a file, which is read again when it changes."""

    def __init__(self, path: Path):
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._asked = False
        self._known: dict[bytes, Key] = {}  # digest of a whole key that was checked -> whose it is
        self._checking = threading.Lock()  # one guess at a time costs processor time, however many are made
        self._buckets: dict[str, tuple[float, float]] = {}
        self._read()

    def __bool__(self) -> bool:
        """Whether a key is asked for: there is one, or there has been one. Removing the last opens nothing."""
        self._read()
        return self._asked

    def all(self) -> list[Key]:
        self._read()
        return sorted(self._keys.values(), key=lambda key: key.name)

    def remembered(self, text: str) -> Key | None:
        """The key, if `check` has found it right before. Costs nothing."""
        self._read()
        return self._known.get(hashlib.sha256(text.encode()).digest())

    def holds(self, caller: Caller) -> bool:
        """Whether the caller's key, if there is one, has not been removed since."""
        self._read()
        return caller.key is None or self._keys.get(caller.key.id) == caller.key

    def check(self, text: str) -> Key | None:
        """The key that this is, or None. Takes some 50 ms: for threads."""
        match = re.fullmatch(rf"{PREFIX}_([0-9a-f]{{8}})_([A-Za-z0-9_-]{{20,80}})", text)
        key = self._keys.get(match[1]) if match else None
        if match is None or key is None:
            return None
        with self._checking:
            right = hmac.compare_digest(_hash(match[2], key.salt), key.hash)
        if not right or self._keys.get(match[1]) != key:  # it may have been removed meanwhile
            return None
        self._known[hashlib.sha256(text.encode()).digest()] = key
        return key

    def spend(self, key: Key, now: float) -> None:
        """One job of this minute's. Refused with the seconds to wait where they are spent (a token bucket)."""
        if key.per_minute is None:
            return
        size = max(1.0, key.per_minute)
        left, last = self._buckets.get(key.name, (size, now))
        left = min(size, left + (now - last) * key.per_minute / 60)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / key.per_minute - 1e-6)
            raise Refused(
                429,
                f"{key.per_minute:g} jobs a minute are all this key may ask for: try again in {wait} s",
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
            self._asked = self._asked or bool(self._keys)
            self._stamp = stamp


def read_keys(path: Path) -> list[Key]:
    """The keys in a file; none where there is no file. InputError where it is no such file."""
    try:
        return [Key(**key) for key in json.loads(path.read_text("utf-8"))["keys"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of keys ({error}): give another --api-key-file") from None


def add_key(path: Path, name: str, now: float, **limits: Any) -> str:
    """A new key, which is written nowhere: only its hash is. limits: fields of Key. InputError if the name is taken."""
    keys = read_keys(path)
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise InputError(f"{name!r} is no name for a key: take letters, digits, dots and dashes, at most 64")
    if any(key.name == name for key in keys):
        raise InputError(f"there is a key {name} already: remove it first, or take another name")
    identity, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_hex(16)
    key = Key(name, identity, salt, _hash(secret, salt), now, **limits)
    _write(path, [*keys, key])
    return f"{PREFIX}_{identity}_{secret}"


def remove_key(path: Path, name: str) -> None:
    """InputError where there is no such key."""
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise InputError(f"there is no key {name}: there is {known}")
    _write(path, [key for key in keys if key.name != name])


def given_key(headers: Mapping[str, str], cookies: Mapping[str, str]) -> str | None:
    """The key that a request carries: as a bearer token, as the password of basic authentication, or in the cookie."""
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
    """What makes a path readable without a key until a time in unix seconds."""
    return hmac.new(secret.encode(), f"{path}\n{until}".encode(), "sha256").hexdigest()


def is_signed(secret: str, path: str, until: str, signature: str, now: float) -> bool:
    """Whether `sign` made this signature, and its time has not passed."""
    if not until.isdecimal() or len(until) > 12 or int(until) < now:
        return False
    return hmac.compare_digest(sign(secret, path, int(until)).encode(), signature.encode())


def _hash(secret: str, salt: str) -> str:
    return hashlib.scrypt(secret.encode(), salt=bytes.fromhex(salt), dklen=32, maxmem=64 << 20, **COST).hex()


def _write(path: Path, keys: list[Key]) -> None:
    """The file, readable by its owner alone, whole or not at all."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"version": 1, "keys": [asdict(key) for key in keys]}, file, indent=2)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): give another --api-key-file") from None
    finally:
        part.unlink(missing_ok=True)
