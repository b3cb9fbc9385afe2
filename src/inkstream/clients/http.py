"""`Client.submit(Request) -> Iterator[Event]`: the Drawer that draws on a server, over HTTP. It needs no torch."""

from __future__ import annotations

import base64
import io
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import quote, urlsplit

from PIL import Image

from inkstream.engine.pictures.inputs import read_source
from inkstream.engine.pictures.metadata import PICTURE_FIELDS, told_in
from inkstream.engine.wire import Direct, read_events
from inkstream.types import Done, Event, Failed, InputError, Loading, Queued, Request, Result, Spec, Step

SILENCE = 60.0
"""Seconds without a byte after which a connection counts as lost. The server sends a ping every 15 seconds."""
PAUSE = 0.5
"""Seconds before the first retry."""
LOST = (OSError, HTTPException)
"""Errors of a connection that fails or breaks."""


class Refusal(Exception):
    """An HTTP answer with an error status."""

    def __init__(self, status: int, message: str, wait: float = 0.0):
        super().__init__(message)
        self.status = status
        self.wait = wait  # seconds to wait before a retry (Retry-After)


class Client:
    """Draws requests on a server. It is a Drawer, as `Engine` is.

    url: the server's address, as http://127.0.0.1:8400. key: an API key of the server. patience: how many seconds to
    retry when the server stops answering. A job goes on without its client, and the client follows it again. Raises
    InputError for an invalid url.
    """

    def __init__(self, url: str, key: str | None = None, patience: float = 60.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url} is not a server's address: write it as http://127.0.0.1:8400")
        if parts.path.rstrip("/").endswith("/v1"):
            raise InputError(f"{url} is the address for OpenAI's clients: leave /v1 out")
        self.url = url.rstrip("/")
        self.patience = patience
        self._key = key
        self._reached = False
        self._opener = urllib.request.build_opener(Direct)

    def submit(self, request: Request) -> Iterator[Event]:
        """Yield the events of a request, and a Done for each picture. Closing the iterator cancels at the next step.

        If the request cannot be drawn, or the server cannot be reached, the last event is Failed; nothing is raised.
        The server's remarks on the request come as notes of Loading events.
        """
        try:
            job = self._accepted(request)
        except InputError as error:
            yield Failed(str(error), "input")
            return
        yield Queued(request, job["position"] or 0)
        ended = False
        try:
            with closing(self._follow(job["id"], request)) as events:
                yield from events
            ended = True
        except InputError as error:
            yield Failed(str(error), "input")
        finally:
            if not ended:
                with suppress(InputError, *LOST, Refusal):
                    self._once("DELETE", f"/v1/jobs/{job['id']}")

    def generate(self, request: Request) -> Result:
        """Return all pictures of a request. Raises InputError if it cannot be drawn."""
        return Result.of(self.submit(request))

    def models(self) -> list[Spec]:
        """Return the models that the server offers, its default first. Raises InputError if the server is not there."""
        return [_spec(model) for model in self._object("data", "GET", "/v1/models")["data"]]

    def spec(self, name: str) -> Spec:
        """Return a model's Spec without the sizes of its parts. Raises InputError if it is not offered."""
        return _spec(self._object("inkstream", "GET", f"/v1/models/{quote(name, safe='')}"))

    def remarks(self, request: Request) -> list[str]:
        """Return nothing: a server's remarks come as notes of Loading events."""
        return []

    def ran_on(self, name: str) -> dict[str, str]:
        """Return nothing: a server does not tell its clients what it runs on."""
        return {}

    # Inside: a job --------------------------------------------------------------------------------------------------

    def _accepted(self, request: Request) -> dict[str, Any]:
        """Submit the request and return its job. The idempotency key makes retries safe."""
        fields = request.model_dump(mode="json", exclude_unset=True)
        for name in PICTURE_FIELDS:
            given = getattr(request, name)
            if isinstance(given, str):
                fields[name] = self._upload(given)
            elif given:
                fields[name] = [self._upload(one) for one in given]
        return self._object("position", "POST", "/v1/jobs", fields, {"Idempotency-Key": secrets.token_hex(16)})

    def _upload(self, source: str) -> str:
        """Upload a picture, and return its name in the server's requests."""
        if source.startswith("upload:"):
            return source
        return "upload:" + self._object("id", "POST", "/v1/uploads", read_source(source))["id"]

    def _follow(self, job: str, request: Request) -> Generator[Event, None, None]:
        """Yield a job's events to its end, each picture once. Broken connections are made again."""
        seen: set[int] = set()
        told, last = False, ""
        for name, identity, data in self._happenings(job):
            last = identity or last
            if name in ("step", "picture") and not told:
                told = True
                for line in self._ask("GET", f"/v1/jobs/{job}")["remarks"]:
                    yield Loading("model", note=line)
            if name == "queued":
                yield Queued(request, data["position"])
            elif name == "lost":
                note = f"the server at {self.url} does not answer: waiting {self.patience:g} s for it to be there again"
                yield Loading("server", note=note)
            elif name == "loading":
                yield Loading(data["what"], data["done"], data["total"])
            elif name == "step":
                yield _step(data)
            elif name == "picture" and data["index"] not in seen:
                seen.add(data["index"])
                image, told = self._picture(data["url"])
                yield Done(image, _drawn(data, request), data["index"], request.count, data["seconds"], told)
            elif name == "failed":
                error = data["error"]
                yield Failed(error["message"], "input" if error["type"] == "invalid_request_error" else "internal")
            elif name == "cancelled":
                yield Failed("the job was cancelled on the server: submit it again", "input")

    def _happenings(self, job: str) -> Generator[tuple[str, str, dict[str, Any]], None, None]:
        """Yield name, id and data of a job's server-sent events, to its end. Broken connections are made again.

        The event `lost` is added if a connection cannot be made again at once.
        """
        last, lost, said = "", 0.0, False
        while True:
            reason = "it ends its answers too early"
            seen = {"Last-Event-ID": last} if last else {}
            try:
                with self._open("GET", f"/v1/jobs/{job}/events", None, seen) as answer:
                    for name, identity, data in read_events(answer):
                        last, lost, said = identity, 0.0, False
                        yield name, identity, data
                        if name in ("succeeded", "failed", "cancelled"):
                            return
            except Refusal as refusal:
                if refusal.status < 500:
                    raise InputError(str(refusal)) from None
                reason = str(refusal)
            except LOST as error:
                reason = _reason(error)
            if not lost:
                lost = time.monotonic()
            elif time.monotonic() - lost > self.patience:
                raise self._gone(reason)
            elif not said:
                said = True
                yield "lost", "", {}
            time.sleep(PAUSE)

    def _picture(self, url: str) -> tuple[Image.Image, str]:
        """Download a finished picture, as RGB, and the prompt that a grammar told the model."""
        image = Image.open(io.BytesIO(self._ask("GET", url)))
        told, colours = told_in(image), image.convert("RGB")
        colours.info = {}
        return colours, told

    # Inside: HTTP ---------------------------------------------------------------------------------------------------

    def _object(
        self, name: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return the answer, a JSON object. Raises InputError if it lacks `name`: another program answered."""
        answer = self._ask(method, path, body, headers)
        if not isinstance(answer, dict) or name not in answer:
            raise InputError(f"{self.url} is not an inkstream server: check its address")
        return answer

    def _ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """Return the answer: parsed JSON, or bytes. Retries within `patience` if the server is full or does not answer.

        Raises InputError if the server refuses, or is not there.
        """
        began, pause = time.monotonic(), PAUSE
        while True:
            try:
                return self._once(method, path, body, headers)
            except Refusal as refusal:
                if refusal.status not in (429, 503) or time.monotonic() - began + refusal.wait > self.patience:
                    raise InputError(str(refusal)) from None
                pause = max(pause, refusal.wait)
            except LOST as error:
                if not self._reached or time.monotonic() - began > self.patience:
                    raise self._gone(_reason(error)) from None
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _once(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        with self._open(method, path, body, headers or {}) as answer:
            data = answer.read()
            return _read(data) if answer.headers.get_content_type() == "application/json" else data

    def _open(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> HTTPResponse:
        """Return an open answer; the caller closes it. Raises Refusal for an error status."""
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        known = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": kind, **known, **headers}, method=method)
        try:
            answer = self._opener.open(asked, timeout=SILENCE)
        except urllib.error.HTTPError as refused:
            self._reached = True
            with refused:
                if refused.code == 401 and not self._key:
                    needs = "set INKSTREAM_API_KEY, or give Client(url, key)"
                    raise Refusal(401, f"the server at {self.url} asks for a key: {needs}") from None
                raise _refusal(refused) from None
        self._reached = True
        return answer

    def _gone(self, reason: str) -> InputError:
        return InputError(f"the server at {self.url} does not answer ({reason}): start it, or give another address")


def _read(data: bytes) -> Any:
    """Return the parsed JSON; None if it is not JSON."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def _refusal(answer: urllib.error.HTTPError) -> Refusal:
    """Return the server's reason, or a general one if another program answered."""
    try:
        error = json.loads(answer.read())["error"]
        return Refusal(answer.code, str(error["message"]), float(answer.headers.get("Retry-After") or 0))
    except (ValueError, LookupError, TypeError, *LOST):
        return Refusal(answer.code, f"the server answered {answer.code} {answer.reason}: check its address")


def _reason(error: BaseException) -> str:
    """Return why a connection failed, as one line."""
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def _spec(model: Mapping[str, Any]) -> Spec:
    """A Spec from an entry of /v1/models. The server does not know the defaults of a model that it has not read yet."""
    facts = model["inkstream"]
    defaults = {"steps": 0, "guidance": 1.0, **facts["defaults"]}
    own = ("steps", "guidance", "solver", "schedule", "strength")
    return Spec(
        name=model["id"],
        family="",
        transformer=None,
        text_encoder=None,
        vae=None,
        shift=defaults.get("shift") or 1.0,
        size=tuple(facts["size"]),
        multiple=facts["multiple"],
        abilities=frozenset(facts["abilities"]),
        licence=facts["licence"],
        commercial=facts["commercial"],
        title=facts["title"],
        **{field: defaults[field] for field in own if field in defaults},
    )


def _step(data: Mapping[str, Any]) -> Step:
    preview = None
    if data["preview"] is not None:
        preview = Image.open(io.BytesIO(base64.b64decode(data["preview"].partition(",")[2])))
    return Step(data["step"], data["steps"], data["picture"], data["of"], data["t"], data["seconds"], preview)


def _drawn(data: Mapping[str, Any], request: Request) -> Request:
    """Return the complete request of a picture. Its input pictures keep their local names."""
    given = {name: getattr(request, name) for name in PICTURE_FIELDS}
    return Request.model_validate({**data["request"], **given})
