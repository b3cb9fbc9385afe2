"""Shared by all routers: the parts of the server, the caller, and answers that are streams of events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer

from inkstream import types
from inkstream.serve.api.fetch import fetch
from inkstream.serve.engines.models import Offered
from inkstream.serve.errors import Refused, disk_full
from inkstream.serve.keys import Caller, Keys
from inkstream.serve.limits import Settings
from inkstream.serve.metrics import Metrics
from inkstream.serve.queue.feed import Happening
from inkstream.serve.queue.inputs import decode, examine, keep, pictures_in
from inkstream.serve.queue.jobs import Jobs
from inkstream.serve.queue.store import Store


@dataclass(frozen=True)
class Service:
    """The parts of one server."""

    settings: Settings
    store: Store
    keys: Keys
    models: dict[str, Offered]
    jobs: Jobs
    metrics: Metrics
    started: float
    aliases: dict[str, str] = field(default_factory=dict)  # name in OpenAI's API -> model

    @cached_property
    def fetchers(self) -> CapacityLimiter:
        """Limits the threads that wait for other servers, so that local work always finds a thread.

        It is made at its first use, because anyio 3 makes one only inside an event loop.
        """
        return CapacityLimiter(8)

    @cached_property
    def mapping(self) -> CapacityLimiter:
        """Lets one map of a picture be drawn at a time. It is made at its first use, as `fetchers`."""
        return CapacityLimiter(1)

    async def take_pictures(self, caller: Caller, request: types.Request) -> types.Request:
        """Store all pictures of a request, and return it with each picture as `upload:ID`.

        Every route that draws calls this first and `jobs.submit` second. Raises Refused if a value is not a picture, or
        the picture is too large.
        """
        if next(pictures_in(request), None) is None:
            return request
        limits = self.settings.limits
        outside = fetch if self.settings.fetch else None
        limiter = self.fetchers if outside and any(g[:4].lower() == "http" for *_, g in pictures_in(request)) else None
        found = await to_thread.run_sync(decode, request, outside, limits, limiter=limiter)
        uploads = {given: (data, await self.examine(caller, data, param)) for given, (data, param) in found.items()}
        return keep(self.store, request, uploads, caller.scope)

    async def examine(self, caller: Caller, data: bytes, param: str | None = None) -> Any:
        """The Upload record for a picture's bytes.

        Raises Refused if they are not a picture, the disk is full, or the key's uploads take too much space.
        """
        limits = self.settings.limits
        if self.store.free() < limits.reserve:
            raise disk_full()
        room = limits.upload_total - self.store.uploaded(caller.name)
        if caller.key is not None and len(data) > room:
            raise Refused(
                429, f"this key has {limits.upload_total >> 20} MiB of uploads: unused ones are removed after a week",
                code="insufficient_quota", retry_after=86_400,
            )  # fmt: skip
        return await to_thread.run_sync(examine, data, caller.name, time.time(), limits, param)


def _service(request: Request) -> Service:
    return request.app.state.service


def _caller(request: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False, description="A key."))]) -> Caller:
    """The caller, as identified by app.Guard."""
    return request.scope["caller"]


Parts = Annotated[Service, Depends(_service)]
Who = Annotated[Caller, Depends(_caller)]


def stream(parts: Service, who: Caller, happenings: AsyncIterator[Happening], named: bool = False) -> StreamingResponse:
    """Events of jobs as server-sent events. named: each event contains its job's id.

    The stream ends when the client disconnects or its key is removed, at the next event or ping.
    """

    async def lines() -> AsyncIterator[bytes]:
        async for happening in happenings:
            if not parts.keys.holds(who):
                return
            if happening.name == "ping":
                yield b": ping\n\n"
                continue
            data = {"job": happening.job, **happening.data} if named else happening.data
            head = f"id: {parts.jobs.feed.name_of(happening)}\nevent: {happening.name}\n"
            yield f"{head}data: {json.dumps(data)}\n\n".encode()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
"""OpenAPI 3.2 schema of a stream of events: each is an object whose `data` is JSON."""
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events, as they happen.",
        "content": EVENT_STREAM,
    }
}
"""OpenAPI response of a route that answers with a stream of events."""
