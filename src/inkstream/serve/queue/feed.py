"""Events of jobs, sent to listeners in order. Recent events are kept for clients that reconnect."""

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
"""Number of lasting events that are kept for clients that reconnect."""
BEHIND = 500
"""Most unread events of one listener. A slower listener is disconnected and may reconnect."""


class Happening(NamedTuple):
    """One event of one job. lasting: the event is sent again to a client that missed it."""

    number: int
    job: str
    key: str
    name: str
    data: dict[str, Any]
    lasting: bool


class Listener:
    """The unread events of one client. None in the queue means the end."""

    def __init__(self, job: str | None, key: str | None):
        self.job = job
        self.key = key
        self.waiting: asyncio.Queue[Happening | None] = asyncio.Queue()

    def wants(self, happening: Happening) -> bool:
        """Whether the event belongs to the listener's job and key; None means any."""
        return self.job in (None, happening.job) and (self.key is None or self.key == happening.key)

    async def all(self, ping: float) -> AsyncIterator[Happening]:
        """Yield events as they happen, until the end of the feed. After `ping` seconds without one, yield a `ping`."""
        while True:
            try:
                happening = await asyncio.wait_for(self.waiting.get(), ping)
            except TimeoutError:
                happening = Happening(0, "", "", "ping", {}, False)
            if happening is None:
                return
            yield happening


class Feed:
    """All events in their order. All methods run in one event loop."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(16)  # event ids from before a restart of the server are not valid
        self.number = 0  # number of the last event
        self._kept: deque[Happening] = deque(maxlen=KEPT)
        self._listeners: set[Listener] = set()
        self.closed = False

    def tell(self, job: str, key: str, name: str, data: dict[str, Any], lasting: bool = True) -> None:
        """Send an event to all listeners. lasting: False for a step or a queue position, which is soon out of date."""
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
                self._disconnect(listener)

    @contextmanager
    def listen(self, job: str | None = None, key: str | None = None) -> Iterator[Listener]:
        """A listener to the events of a job, or of all jobs of a key, from now on."""
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
        """The event's id, which a client sends back as Last-Event-ID.

        The id hides the number, because the number also counts the events of other keys.
        """
        return self._name(happening.number)

    def missed(self, last: str | None, listener: Listener) -> list[Happening] | None:
        """The lasting events after the event with the id `last`; None if that event is too old or unknown."""
        match = re.fullmatch("([0-9a-f]{16})-([0-9a-f]{16})", last or "")
        number = -1 if match is None else int(match[2], 16) ^ int(self._hash(match[1]), 16)
        if self._name(number) != last or (len(self._kept) == KEPT and number < self._kept[0].number - 1):
            return None
        return [happening for happening in self._kept if happening.number > number and listener.wants(happening)]

    def close(self) -> None:
        """End all listeners, because the server stops."""
        self.closed = True
        for listener in list(self._listeners):
            self._disconnect(listener)

    def _name(self, number: int) -> str:
        """The id of an event number: always the same, and unreadable without the secret."""
        salt = self._hash(str(number))
        return f"{salt}-{number ^ int(self._hash(salt), 16):016x}"

    def _hash(self, text: str) -> str:
        return hashlib.blake2b(text.encode(), key=self._secret, digest_size=8).hexdigest()

    def _disconnect(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        listener.waiting.put_nowait(None)
