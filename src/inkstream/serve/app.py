"""The ASGI application: routers behind one guard, which checks keys, origins and body sizes.

Each router is one line in ROUTERS.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, quote

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from python_multipart.exceptions import FormParserError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inkstream import __version__
from inkstream.serve.api import (
    a1111,
    comfyui,
    compare,
    controlnet,
    controls,
    gallery,
    loras,
    native,
    openai,
    status,
    studio,
    upscalers,
)
from inkstream.serve.api.service import Service
from inkstream.serve.engines.models import offer, read_aliases
from inkstream.serve.engines.process import EngineProcess, MakeEngine
from inkstream.serve.errors import MEANINGS, Refused, explain, explain_trouble
from inkstream.serve.keys import ANYONE, LINK, Caller, Keys, given_key, is_signed
from inkstream.serve.limits import LOCAL_NAMES, Settings, check_address
from inkstream.serve.metrics import Metrics
from inkstream.serve.queue.jobs import Jobs
from inkstream.serve.queue.store import Store

ROUTERS = (
    status.router,
    native.router,
    gallery.router,
    loras.router,
    controls.router,
    upscalers.router,
    compare.router,
    openai.router,
    a1111.router,
    controlnet.router,
    comfyui.router,
    studio.router,
)
"""All routers. The studio, at `/`, is one of them."""
OPEN = ("/", "/healthz", "/readyz", "/openapi.json")
"""Paths that need no key. If the server has keys, every other path needs one, even a path without a route."""
OPEN_BELOW = "/studio/"
"""Prefix of the paths of the studio's scripts and styles. They need no key."""
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")
"""A valid Host header: a name or an address, with or without a port."""
SLOWEST = 4096
"""Bytes of a body for each second beyond `body_seconds`: a body with a lower average speed is refused."""
log = logging.getLogger("inkstream.serve")


def build(settings: Settings, make: MakeEngine = EngineProcess) -> FastAPI:
    """Make the application of one server.

    make: starts the engine. Raises InputError if the address, the folder, the keys or the models are not usable.
    """
    keys = Keys(settings.keys)
    check_address(settings.host, bool(keys))
    models = offer(settings.models, settings.machine)
    aliases = read_aliases(settings.aliases, models)
    store = Store(settings.data)
    metrics = Metrics()
    jobs = Jobs(settings, store, models, keys, metrics, make)
    service = Service(settings, store, keys, models, jobs, metrics, time.time(), aliases)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await jobs.start()
        try:
            yield
        finally:
            await jobs.stop()
            store.close()

    app = FastAPI(
        title="inkstream",
        version=__version__,
        description="Text to image on your own machine.",
        lifespan=life,
        docs_url=None,  # its page would load scripts from another server
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go to the host in the Host header
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(Refused, _refuse)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _refuse_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(FormParserError, _refuse_form)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _refuse_http)  # type: ignore[arg-type]
    app.add_exception_handler(sqlite3.Error, _answer_disk_error)  # type: ignore[arg-type]
    app.add_exception_handler(OSError, _answer_disk_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _answer_internal_error)
    app.add_middleware(Guard, service=service)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


class Guard:
    """Middleware before every route: checks key, origin and body size, and logs the answers."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        if scope["type"] == "websocket":
            # A browser lets any page open a WebSocket, so the origin is checked as for a request that changes data.
            request = Request({**scope, "type": "http", "method": "CONNECT"})
            try:
                scope["caller"] = await self._identify(request)
            except Refused as refusal:
                # An ASGI server answers this early close with 403.
                self._record(request, scope, 403, time.perf_counter() - began)
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
                return
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *SAFE]
                self._record(request, scope, status, time.perf_counter() - began)
            await send(message)

        try:
            caller = await self._identify(request)
            if caller is not None:
                scope["caller"] = caller
            body = self._limited(request, receive)
        except Refused as refusal:
            await _answer(refusal)(scope, receive, answer)
            return
        await self.app(scope, body, answer)

    async def _identify(self, request: Request) -> Caller | None:
        """The caller of a request; None for an open path on a server with keys. Raises Refused without a valid key.

        This method never uses `request.url`: it is made from the Host header, which the client chooses.
        """
        keys, path = self.service.keys, route_path(request.scope)
        if not path.startswith("/"):
            raise Refused(400, f"the target {path[:100]} is not a path: send a path that begins with /")
        _check_origin(request, _host_of(request.scope), open_to_all=not keys)
        if not keys:
            return ANYONE
        if path in OPEN or path.startswith(OPEN_BELOW):
            return None
        given = given_key(request.headers, request.cookies)
        if given is None:
            query = parse_qs(request.scope.get("query_string", b"").decode("latin-1"))
            until, signature = (query.get(name, [""])[0] for name in ("until", "signature"))
            if request.method in ("GET", "HEAD") and is_signed(
                self.service.jobs.secret, path, until, signature, time.time()
            ):
                return LINK
            raise Refused(401, "this server needs a key: send it as Authorization: Bearer KEY", code="no_api_key")
        key = keys.remembered(given) or await to_thread.run_sync(keys.check, given)
        if key is None:
            raise Refused(401, "the key is not known: check it, or ask for a new one", code="invalid_api_key")
        return Caller(key.name, None if key.admin else key.name, key)

    def _limited(self, request: Request, receive: Receive) -> Receive:
        """`receive` with limits on the size and the slowness of the body. Raises Refused if Content-Length is too big.

        Later, a body that is too slow is answered with 408, and a body that is too large with 413.
        """
        limits = self.service.settings.limits
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limits.body_bytes:
            raise self._too_large()
        read, whole, began = 0, False, time.monotonic()

        async def next_piece() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()  # waits until the client disconnects
            left = began + limits.body_seconds + read / SLOWEST - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), min(left, limits.body_seconds))
            except TimeoutError:
                raise HTTPException(408, "the body arrived too slowly: send it again") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > limits.body_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return next_piece

    def _too_large(self) -> Refused:
        most = self.service.settings.limits.body_bytes >> 20
        return Refused(413, f"the body has more than {most} MiB: scale the pictures down", code="body_too_large")

    def _record(self, request: Request, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.service.metrics.http.labels(request.method, route, str(status)).observe(seconds)
        if status >= 400:
            self.service.metrics.refused.labels(str(status)).inc()
        caller = scope.get("caller")
        key = caller.name if caller is not None else ""
        facts = {"method": request.method, "path": scope["path"], "status": status, "key": key}
        level = logging.DEBUG if status < 400 else logging.INFO
        log.log(level, "answered", extra=facts | {"seconds": round(seconds, 4)})


SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
"""Headers of every answer."""


def route_path(scope: Scope) -> str:
    """The path that the router uses: the request's path without the application's root path."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _host_of(scope: Scope) -> str:
    """The Host header; empty if there is none, as in HTTP/1.0. Raises Refused if it is not valid or comes twice."""
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) > 1:
        raise Refused(400, f"the request has {len(hosts)} Host headers: send one")
    if hosts and not HOST.fullmatch(hosts[0]):
        raise Refused(400, f"Host {hosts[0][:100]!r} is not a host: send a name or an address, with or without a port")
    return hosts[0] if hosts else ""


def _check_origin(request: Request, host: str, open_to_all: bool) -> None:
    """Raise Refused if a page of another site sends the request through the user's browser.

    open_to_all: the server has no keys, so it answers only to names of this machine. Any other name may point here by
    DNS rebinding. A request with a bearer token passes: a browser never adds one by itself.
    """
    if open_to_all and _name_of(host) not in LOCAL_NAMES:
        raise Refused(403, f"without keys the server does not answer to {host[:100]}: use localhost, or make a key")
    origin = request.headers.get("origin")
    bearer = request.headers.get("authorization", "").lower().startswith("bearer ")
    if origin is None or bearer or request.method in ("GET", "HEAD", "OPTIONS"):
        return
    if origin.partition("://")[2] != host:
        raise Refused(403, f"pages of {origin[:100]} may not use this server: send a bearer token")


def _name_of(host: str) -> str:
    """A Host header without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _answer(refusal: Refused) -> JSONResponse:
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(refusal.retry_after)))
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body(), refusal.status, headers)


async def _refuse(request: Request, refusal: Refused) -> Response:
    return _answer(refusal)


async def _refuse_invalid(request: Request, error: RequestValidationError) -> Response:
    return _answer(explain(error.errors()))


async def _refuse_form(request: Request, error: FormParserError) -> Response:
    """Older starlette lets this error through; newer starlette turns it into an HTTPException."""
    return _answer(Refused(400, f"the form cannot be read: {error}"))


async def _refuse_http(request: Request, error: HTTPException) -> Response:
    path = quote(request.scope["path"])
    message = {
        404: f"there is nothing at {path[:200]}: see /openapi.json",
        405: f"{path[:200]} does not support {request.method}: see /openapi.json",
    }
    answer = _answer(Refused(error.status_code, message.get(error.status_code, str(error.detail))))
    answer.headers.update(error.headers or {})
    return answer


async def _answer_disk_error(request: Request, error: OSError | sqlite3.Error) -> Response:
    log.error("the disk or the database failed", exc_info=error, extra={"reason": str(error)})
    return _answer(explain_trouble(error))


async def _answer_internal_error(request: Request, error: Exception) -> Response:
    return _answer(Refused(500, f"{type(error).__name__} in the server, see its log"))


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document with corrections that FastAPI cannot know.

    An invalid body gets 400, not 422; a slow body gets 408, a large one 413. Keys are optional: a server may have none.
    """
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                if "security" in operation:
                    operation["security"].insert(0, {})
                if "requestBody" in operation:
                    same = operation["responses"]["400"]
                    for status in (408, 413):
                        operation["responses"][str(status)] = same | {"description": MEANINGS[status]}
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
