"""Serves the voting page on this machine, and saves the votes that it sends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from inkstream.evaluate.bakeoff.votes import PAGE, SHOWN, save_votes
from inkstream.types import InputError

HOST = "127.0.0.1"
MOST = 16 << 20
"""Most bytes of a voter's votes."""
PICTURE = re.compile(rf"/{SHOWN}/[0-9a-f]{{16}}\.png")


@contextmanager
def serve_votes(folder: Path, port: int) -> Iterator[ThreadingHTTPServer]:
    """A server of the page, its pictures and the votes of a folder, on 127.0.0.1. port: 0 for any free one.

    Raises InputError if the port is taken.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), partial(Polls, folder))
    except OSError as error:
        raise InputError(f"port {port} cannot be opened ({error.strerror}): give another --port") from None
    server.daemon_threads = True
    with server:
        yield server


class Polls(BaseHTTPRequestHandler):
    """Answers the requests of the page. Those of other sites, by Host and Origin, are refused."""

    def __init__(self, folder: Path, *args: object):
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        if not self._is_ours():
            self._answer(403, b"", "text/plain")
        elif self.path == "/":
            self._answer(200, (self.folder / PAGE).read_bytes(), "text/html; charset=utf-8")
        elif PICTURE.fullmatch(self.path) and (path := self.folder / self.path[1:]).exists():
            self._answer(200, path.read_bytes(), "image/png")
        else:
            self._answer(404, b"", "text/plain")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._is_ours() or self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            self._answer(403, b"", "text/plain")
        elif self.path != "/votes" or not length.isdecimal() or int(length) > MOST:
            self._answer(400, b"", "text/plain")
        else:
            try:
                save_votes(self.folder, self.rfile.read(int(length)).decode("utf-8", "replace"), "the page")
            except InputError as error:
                self._answer(400, str(error).encode(), "text/plain; charset=utf-8")
            else:
                self._answer(204, b"", "text/plain")

    def _is_ours(self) -> bool:
        _, port = self.connection.getsockname()
        return self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if status != 204:
            self.wfile.write(body)
