"""What every router works with: the parts of the server, who asks, and answers that go on as events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
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
    fetchers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(8))
    """Threads that may wait for other servers: the rest are for what is here."""

    async def take_pictures(self, caller: Caller, request: types.Request) -> types.Request:
        """The request with every picture it brings kept, as `upload:ID`. Refused where one is none, or may not be.

        The first step of every route that draws; the second is `jobs.submit`.
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
        """The upload that bytes become. Refused where they are no picture, or the caller's room is full."""
        limits = self.settings.limits
        if self.store.free() < limits.reserve:
            raise disk_full()
        room = limits.upload_total - self.store.uploaded(caller.name)
        if caller.key is not None and len(data) > room:
            raise Refused(
                429, f"uploads of this key take {limits.upload_total >> 20} MiB: unused ones go after a week",
                code="insufficient_quota", retry_after=86_400,
            )  # fmt: skip
        return await to_thread.run_sync(examine, data, caller.name, time.time(), limits, param)


def _service(request: Request) -> Service:
    return request.app.state.service


def _caller(request: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False, description="A key."))]) -> Caller:
    """Who asks, as the guard in front of all routes found."""
    return request.scope["caller"]


Parts = Annotated[Service, Depends(_service)]
Who = Annotated[Caller, Depends(_caller)]


def stream(parts: Service, who: Caller, happenings: AsyncIterator[Happening], named: bool = False) -> StreamingResponse:
    """Happenings as server-sent events; named: each says which job it is about.

    They end when the client leaves or when its key is removed: at the next happening, a ping at the latest.
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
"""What a route declares of events, as OpenAPI 3.2 has it: each is an object whose `data` is JSON."""
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events, as they happen.",
        "content": EVENT_STREAM,
    }
}
"""What a route declares whose answer is events."""
