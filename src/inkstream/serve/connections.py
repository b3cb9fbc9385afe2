"""Time limits for HTTP connections: uvicorn itself waits without limit for the head of a request."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD = 10.0
"""Seconds for the whole head of a request, from the start of the connection or the head's first byte."""

WRITE = 120.0
"""Seconds after which a connection is ended if its client has read nothing of the waiting data."""

FILES = 65_536
"""Wanted limit of open files and connections of the process."""

Base: Any = H11Protocol
"""h11 instead of httptools: httptools drops the host of an absolute target, but such a target must be refused."""


class Connection(Base):
    """uvicorn's h11 connection with time limits for the head of a request and for a client that does not read."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing is paused exactly while data waits for the client
        self._start_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_progress()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self  # now a WebSocket, with its own protocol class
        if upgraded or (self.cycle is not None and not self.cycle.response_complete):
            self._stop_head_timer()
            if upgraded:  # from now on the other protocol is told when writing resumes
                self._stop_write_timer()
        elif self._head_timer is None:
            self._start_head_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_head_timer()  # uvicorn's keep-alive limit applies until the next head begins

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(error)

    def _start_head_timer(self) -> None:
        self._head_timer = asyncio.get_running_loop().call_later(HEAD, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _check_progress(self, before: int | None = None) -> None:
        """End the connection if no data has left the write buffer. before: bytes in it at the last check."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        else:
            self._write_timer = asyncio.get_running_loop().call_later(WRITE, self._check_progress, left)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def allow_many() -> None:
    """Raise the process's limit of open files to FILES or the system's maximum. Many systems start with 1,024."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
