"""HTTP to a server of somebody else: retries, waits that can be cancelled, errors of one line, a key that stays secret.

Each function is a generator. It yields a line for the user about once a second while it waits, so that whoever reads
it can stop it at any time, and returns the answer. Nothing here logs.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import queue
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar
from urllib.parse import urlsplit

from inkstream import __version__
from inkstream.types import InputError, as_list, as_object

SILENCE = 300.0
"""Seconds without a byte after which a connection counts as lost. Some servers draw while the connection is open."""
TICK = 1.0
"""Seconds between two lines while something waits."""
PAUSE = 0.5
"""Seconds before the first retry without a Retry-After."""
LONGEST_PAUSE = 10.0
MOST = 128 << 20
"""Most bytes of an answer."""
LOST = (OSError, HTTPException)
"""Errors of a connection that fails or breaks."""
BUSY = (429, 503)
"""Statuses of a request that was not taken, so that it can be sent again."""
DONE = "[DONE]"
"""The data of the last event of a stream, in OpenAI's dialect. It is no JSON."""
LOCAL = ("127.0.0.1", "localhost", "::1")

Lines = Generator[str, None, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """A server of somebody else, and how it is spoken to."""

    title: str  # for messages
    address: str  # of its API, without a slash at the end
    remedy: str  # what to check if it refuses the key
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)  # they prove who asks
    secret: str = field(default="", repr=False)  # the key; it is cut out of every message
    moderated: Callable[[Any], bool] = lambda body: False  # whether an error's body says that the content is refused
    patience: float = 180.0  # seconds of retries while it is busy
    reach: float = 180.0  # seconds of retries while it cannot be reached


def open_peer(
    title: str,
    address: str,
    remedy: str,
    secret: str = "",
    headers: Mapping[str, str] | None = None,
    moderated: Callable[[Any], bool] = lambda body: False,
) -> Peer:
    """A Peer. Raises InputError for an address that is none, or that would carry a key in the clear."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise InputError(f"{_shown(address)} is not a server's address: write it as https://example.com/v1")
    if secret and parts.scheme == "http" and parts.hostname not in LOCAL:
        raise InputError(f"{_shown(address)} would carry the key of {title} unencrypted: take an https address")
    return Peer(title, address.rstrip("/"), remedy, headers or {}, secret, moderated)


def ask(
    peer: Peer,
    method: str,
    path: str,
    body: Any = None,
    *,
    form: Sequence[tuple[str, str | bytes]] = (),
    headers: Mapping[str, str] | None = None,
) -> Lines:
    """Send a request and return the answer's JSON.

    path: below the peer's address, or an address of the same owner. form: fields of a multipart body; bytes are PNG
    files. A busy peer is asked again, as its Retry-After says. A GET is also sent again if its connection breaks; any
    other request is not, because it may be drawn and billed already. Raises InputError.
    """
    asked = _request(peer, method, path, body, form, headers or {})
    answer = yield from _patiently(peer, asked, _read)
    if (found := _json(answer.data)) is None:
        raise InputError(f"{peer.title} sent no JSON: check its address {peer.address}")
    return found


def ask_bytes(peer: Peer, path: str, body: Any) -> Lines:
    """Send a POST that changes nothing at the peer, and return the answer's bytes. Raises InputError.

    It is sent again if its connection breaks.
    """
    asked = _request(peer, "POST", path, body, (), {"Accept": "*/*"})
    answer = yield from _patiently(peer, asked, _read, safe=True)
    return answer.data


def stream(
    peer: Peer, path: str, body: Any = None, *, form: Sequence[tuple[str, str | bytes]] = ()
) -> Generator[str | tuple[str, Any], None, None]:
    """Send a POST, and yield the server-sent events of the answer, each as its name and data, between the lines.

    An answer that is one JSON document is yielded as one event without a name.
    """
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def follow(answer: HTTPResponse) -> Answer:
        if answer.headers.get_content_type() != "text/event-stream":
            return _read(answer)
        for name, _, data in read_events(answer):
            told.put((name, data))
        return Answer(answer.status, {}, b"")

    asked = _request(peer, "POST", path, body, form, {"Accept": "text/event-stream"})
    waiting = _patiently(peer, asked, follow)
    while True:
        try:
            line = next(waiting)
        except StopIteration as end:
            answer: Answer = end.value
            break
        yield line
        while not told.empty():
            yield told.get()
    while not told.empty():
        yield told.get()
    if answer.data:
        yield "", _json(answer.data)


def fetch(peer: Peer, url: str) -> Lines:
    """Download a finished picture from an address that the peer gave. The key is not sent along."""
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.netloc != urlsplit(peer.address).netloc:
        raise InputError(f"{peer.title} gave no usable address of the picture: ask for it again")
    asked = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    try:
        answer = yield from _patiently(peer, asked, _read, opener=_FOLLOWING)
    except Gone:
        expired = f"the address of the picture at {peer.title} has expired: ask for the picture again"
        raise InputError(expired) from None
    return answer.data


def rest(peer: Peer, seconds: float) -> Lines:
    """Wait before the next question."""
    end = time.monotonic() + seconds
    yield f"waiting for {peer.title}"
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, TICK))
        yield f"waiting for {peer.title}"


def clean(peer: Peer, text: Any) -> str:
    """A peer's text as one short line without the key."""
    line = " ".join(str(text).split())
    if peer.secret:
        line = line.replace(peer.secret, "***")
    return line[:300]


def reason_in(body: Any) -> str:
    """The reason in an error's body, in one of the forms that servers have; empty if there is none."""
    if several := as_list(body):
        return "; ".join(filter(None, map(reason_in, several[:3])))
    if (found := as_object(body)) is None:
        return body if isinstance(body, str) else ""
    for name in ("error", "message", "msg", "detail", "details", "title"):
        if reason := reason_in(found.get(name)):
            return reason
    return ""


class Direct(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because a key must not go to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def read_events(lines: Iterator[bytes] | HTTPResponse) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the server-sent events: name, id, data."""
    event: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name:
            event[name] = value
            continue
        if event.get("data", DONE) != DONE:
            yield event.get("event", ""), event.get("id", ""), json.loads(event["data"])
        event = {}


# Inside ---------------------------------------------------------------------------------------------------------------

_AGENT = f"inkstream/{__version__}"
_DIRECT = urllib.request.build_opener(Direct)
_FOLLOWING = urllib.request.build_opener()


@dataclass(frozen=True)
class Answer:
    """An answer that is read to its end."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class Gone(InputError):
    """What was asked for is not there any more, or not for this key."""


def _request(
    peer: Peer,
    method: str,
    path: str,
    body: Any,
    form: Sequence[tuple[str, str | bytes]],
    headers: Mapping[str, str],
) -> urllib.request.Request:
    url = path if "://" in path else f"{peer.address}/{path.lstrip('/')}"
    if not _same_owner(url, peer.address):
        other = urlsplit(url).hostname
        raise InputError(f"{peer.title} names {other}, which is not its own host: the key does not go there, try again")
    data, kind = None, "application/json"
    if form:
        data, kind = _multipart(form)
    elif body is not None:
        data = json.dumps(body).encode()
    known = {"Content-Type": kind, "Accept": "application/json", "User-Agent": _AGENT, **peer.headers, **headers}
    return urllib.request.Request(url, data, known, method=method)


def _same_owner(url: str, address: str) -> bool:
    """Whether an address is on the same host, or on one of the same domain, such as api.eu.bfl.ai for api.bfl.ai."""
    ours, theirs = urlsplit(address), urlsplit(url)
    if theirs.netloc == ours.netloc:
        return theirs.scheme == ours.scheme
    domain = ".".join((ours.hostname or "").split(".")[-2:])
    return theirs.scheme == "https" and ours.hostname not in LOCAL and (theirs.hostname or "").endswith(f".{domain}")


def _multipart(form: Sequence[tuple[str, str | bytes]]) -> tuple[bytes, str]:
    """A multipart body and its type."""
    edge = secrets.token_hex(16)
    parts: list[bytes] = []
    for number, (name, value) in enumerate(form):
        file = "" if isinstance(value, str) else f'; filename="{number}.png"\r\nContent-Type: image/png'
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts += [head.encode(), value.encode() if isinstance(value, str) else value, b"\r\n"]
    return b"".join([*parts, f"--{edge}--\r\n".encode()]), f"multipart/form-data; boundary={edge}"


def _patiently(
    peer: Peer,
    asked: urllib.request.Request,
    use: Callable[[HTTPResponse], Answer],
    opener: urllib.request.OpenerDirector = _DIRECT,
    safe: bool = False,
) -> Generator[str, None, Answer]:
    """Open the request and use its answer. See `ask` for what is tried again. safe: as a GET is."""
    began, pause, safe = time.monotonic(), PAUSE, safe or asked.get_method() == "GET"
    while True:
        try:
            return (yield from _aside(lambda: _open(peer, asked, use, opener), f"waiting for {peer.title}"))
        except Busy as busy:
            wait, trouble, limit = max(busy.wait, pause), busy.trouble, peer.patience
        except LOST as error:
            why = clean(peer, getattr(error, "reason", error)) or type(error).__name__
            trouble = InputError(f"{peer.title} cannot be reached ({why}): check the network and {peer.address}")
            if not safe:
                raise trouble from None
            wait, limit = pause, peer.reach
        if time.monotonic() - began + wait > limit:
            raise trouble
        yield from rest(peer, wait)
        pause = min(2 * pause, LONGEST_PAUSE)


class Busy(Exception):
    """The request may be sent again after a wait. trouble: what to raise if there is no patience left."""

    def __init__(self, trouble: InputError, wait: float):
        super().__init__(str(trouble))
        self.trouble = trouble
        self.wait = wait


def _open(
    peer: Peer,
    asked: urllib.request.Request,
    use: Callable[[HTTPResponse], Answer],
    opener: urllib.request.OpenerDirector,
) -> Answer:
    try:
        with opener.open(asked, timeout=SILENCE) as answer:
            return use(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            body = refused.read(1 << 20)
        trouble = _trouble(peer, refused.code, body)
        if refused.code in BUSY or (refused.code >= 500 and asked.get_method() == "GET"):
            raise Busy(trouble, _wait(refused.headers.get("Retry-After", ""))) from None
        raise trouble from None
    except ValueError as error:  # an address or a header that cannot be sent, or an event that is no JSON
        raise InputError(f"{peer.title} cannot be spoken to ({clean(peer, error)}): {peer.remedy}") from None


def _trouble(peer: Peer, status: int, data: bytes) -> InputError:
    """The error of an answer with an error status."""
    body = _json(data)
    reason = clean(peer, reason_in(body)).rstrip(".") or f"status {status}"
    if peer.moderated(body):
        return refusal(peer, reason)
    if status in (401, 403) and peer.secret:
        return Gone(f"{peer.title} does not accept the key ({reason}): {peer.remedy}")
    if status in (401, 403):
        return Gone(f"{peer.title} asks for a key ({reason}): {peer.remedy}")
    if status == 402:
        return InputError(f"{peer.title} asks for payment ({reason}): add credit to your account there")
    if status == 404 or status == 410:
        return Gone(f"{peer.title} does not know this ({reason}): check the model's name and {peer.address}")
    if status == 429:
        return InputError(f"{peer.title} takes no more requests now ({reason}): try again later")
    if status >= 500 or status < 400:
        return InputError(f"{peer.title} fails (status {status}: {reason}): try again later")
    return InputError(f"{peer.title} refuses the request ({reason}): change what it names")


def refusal(peer: Peer, reason: str) -> InputError:
    """The error of a prompt or a picture that a peer's moderation refuses."""
    return InputError(
        f"{peer.title} refuses the content by its rules ({clean(peer, reason)}): change the prompt or the pictures"
    )


def _wait(retry_after: str) -> float:
    """The seconds of a Retry-After, which is a number or a date."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _read(answer: HTTPResponse) -> Answer:
    data = answer.read(MOST + 1)
    if len(data) > MOST:
        raise InputError(f"{urlsplit(answer.url).hostname} sends more than {MOST >> 20} MiB: ask for a smaller picture")
    if (said := answer.headers.get("Content-Length", "")).isdecimal() and int(said) > len(data):
        raise http.client.IncompleteRead(data, int(said) - len(data))
    return Answer(answer.status, dict(answer.headers), data)


def _aside(work: Callable[[], T], line: str) -> Generator[str, None, T]:
    """Do work in a thread, and yield the line until it is done. Closing the generator leaves the thread behind."""
    box: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((True, work()))
        except BaseException as error:  # carried to the caller's thread
            box.put((False, error))

    threading.Thread(target=run, name="inkstream-wire", daemon=True).start()
    while True:
        try:
            done, value = box.get(timeout=TICK)
        except queue.Empty:
            yield line
            continue
        if not done:
            raise value
        return value


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _shown(address: str) -> str:
    """An address without the name and password that it may hold."""
    return address.rpartition("@")[2][:200]
