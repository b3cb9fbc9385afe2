"""What happens to jobs, told as it happens: numbered, to whoever listens, and kept a while for those who come back."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

KEPT = 500
"""Happenings that are remembered for listeners who were away."""
BEHIND = 500
"""Happenings that a listener may not have read yet; who is slower is let go, and may come back."""


class Happening(NamedTuple):
    """One thing that happened to one job. `lasting` ones are told again to those who missed them."""

    number: int
    job: str
    key: str
    name: str
    data: dict[str, Any]
    lasting: bool


class Listener:
    """What one client has still to read. Ends with None."""

    def __init__(self, job: str | None, key: str | None):
        self.job = job
        self.key = key
        self.waiting: asyncio.Queue[Happening | None] = asyncio.Queue()

    def wants(self, happening: Happening) -> bool:
        """Whether it is about the job, or a job of the key, that is listened to; None stands for any."""
        return self.job in (None, happening.job) and (self.key is None or self.key == happening.key)

    async def all(self, ping: float) -> AsyncIterator[Happening]:
        """Happenings as they come; one named `ping` after so many seconds of silence. Ends when there are no more."""
        while True:
            try:
                happening = await asyncio.wait_for(self.waiting.get(), ping)
            except TimeoutError:
                happening = Happening(0, "", "", "ping", {}, False)
            if happening is None:
                return
            yield happening


class Feed:
    """All that happens, in the order it does. Lives in one event loop."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(16)  # numbers of another run of the server mean nothing here
        self.number = 0  # of the last happening
        self._kept: deque[Happening] = deque(maxlen=KEPT)
        self._listeners: set[Listener] = set()
        self.closed = False

    def tell(self, job: str, key: str, name: str, data: dict[str, Any], lasting: bool = True) -> None:
        """Something happened. What is not lasting (a step, a place in the queue) is soon said anew anyway."""
        self.number += 1
        happening = Happening(self.number, job, key, name, data, lasting)
        if lasting:
            self._kept.append(happening)
        for listener in list(self._listeners):
            if not listener.wants(happening):
                continue
            if listener.waiting.qsize() < BEHIND:
                listener.waiting.put_nowait(happening)
            elif lasting:
                self._let_go(listener)

    @contextmanager
    def listen(self, job: str | None = None, key: str | None = None) -> Iterator[Listener]:
        """Everything from now on that happens to a job, or to any job of a key."""
        listener = Listener(job, key)
        if self.closed:
            listener.waiting.put_nowait(None)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def listened_to(self) -> bool:
        return bool(self._listeners)

    def name_of(self, happening: Happening) -> str:
        """What a client gives back as Last-Event-ID. The number is hidden: it counts what happens to other keys."""
        return self._name(happening.number)

    def missed(self, last: str | None, listener: Listener) -> list[Happening] | None:
        """What a listener has missed since the happening it names; None where that is not known any more."""
        match = re.fullmatch("([0-9a-f]{16})-([0-9a-f]{16})", last or "")
        number = -1 if match is None else int(match[2], 16) ^ int(self._hash(match[1]), 16)
        if self._name(number) != last or (len(self._kept) == KEPT and number < self._kept[0].number - 1):
            return None
        return [happening for happening in self._kept if happening.number > number and listener.wants(happening)]

    def close(self) -> None:
        """The server stops: every listener comes to its end."""
        self.closed = True
        for listener in list(self._listeners):
            self._let_go(listener)

    def _name(self, number: int) -> str:
        """What a number is called: the same word each time, from which nobody without the secret can tell it."""
        salt = self._hash(str(number))
        return f"{salt}-{number ^ int(self._hash(salt), 16):016x}"

    def _hash(self, text: str) -> str:
        return hashlib.blake2b(text.encode(), key=self._secret, digest_size=8).hexdigest()

    def _let_go(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        listener.waiting.put_nowait(None)
