"""Connections that say nothing, or half of what they should, are ended: uvicorn itself waits for ever for a head."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD = 10.0
"""Seconds that a connection has to say all of a request's head, from its first byte or its opening."""

FILES = 65_536
"""Files and connections that the process may have open, where the system allows as many."""

Base: Any = H11Protocol
"""httptools drops the host of an absolute target, which is to be refused."""


class Connection(Base):
    """One of h11's, with patience for a head that has an end."""

    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self  # a WebSocket, which has a protocol of its own
        if upgraded or (self.cycle is not None and not self.cycle.response_complete):
            self._forget()
        elif self._watch is None:
            self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._forget()  # the next head may be waited for as long as uvicorn keeps a connection

    def connection_lost(self, error: Exception | None) -> None:
        self._forget()
        super().connection_lost(error)

    def _wait_for_head(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(HEAD, self.transport.abort)

    def _forget(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


def allow_many() -> None:
    """Raise the process's own limit of open files, which is 1,024 on many systems, as far as it may."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
