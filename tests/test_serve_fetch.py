"""No URL of a picture reaches a private address: in no spelling, by no redirect and by no name that changes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import ip_address
from typing import Any

import pytest

from inkstream.serve.api import fetch as module
from inkstream.serve.api.fetch import fetch, is_public
from inkstream.serve.errors import Refused
from inkstream.serve.limits import Settings

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    "address",
    ["::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1",
     "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:a00:1::", "2001:db8::1", "3fff::1", "5f00::1", "100::1", "ff02::1",
     "192.0.0.8", "192.88.99.1", "198.18.0.1", "240.0.0.1", "255.255.255.255"],
)  # fmt: skip
def test_no_private_address_counts_as_public(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    ["http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[fc00::1]/", "http://[fe80::1%lo]/", "http://[fe80::1%25lo]/",
     "http://2130706433/", "http://017700000001/", "http://0177.0.0.1/", "http://0x7f000001/", "http://0x7f.1/",
     "http://127.1/", "http://0/", "http://[::1", "http://[v1.x]/", "http://a\x00b/", "http://127.0.0.1\\@x/",
     "http://x:99999/", "http://\uff11\uff12\uff17.0.0.1/"],
)  # fmt: skip
def test_every_spelling_of_a_local_address_is_refused_in_one_line(url, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was connected to"))
    with pytest.raises(Refused, match="send the picture itself") as refused:
        fetch(url)
    assert refused.value.status == 400


class Outside:
    """A fake internet: host names, and one server behind all public addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.names: dict[str, list[list[str]]] = {}  # name -> its addresses at each look-up; the last entry stays
        self.reached: list[str] = []
        self.answers: Callable[[socket.socket], None] = lambda connection: None
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.lookup, self.connect = socket.getaddrinfo, socket.create_connection
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)
        monkeypatch.setattr(socket, "create_connection", self._connect)
        threading.Thread(target=self._serve, daemon=True).start()

    def _look_up(self, host: Any, *more: Any, **named: Any) -> Any:
        if host not in self.names:
            return self.lookup(host, *more, **named)
        known = self.names[host]
        found = known.pop(0) if len(known) > 1 else known[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 80)) for one in found]

    def _connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        self.reached.append(address[0])
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(self.listening.getsockname())
        return connection

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                self.answers(connection)


@pytest.fixture
def outside(monkeypatch) -> Iterator[Outside]:
    one = Outside(monkeypatch)
    with closing(one.listening):
        yield one


def test_a_file_at_a_public_address_is_downloaded(outside):
    outside.names["pictures.example"] = [[PUBLIC]]
    outside.answers = lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npixels")
    assert fetch("http://pictures.example/x.png") == b"pixels"
    assert outside.reached == [PUBLIC]


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1/", "http://[::1]/", "http://[::ffff:10.0.0.1]/", "http://2130706433/", "http://0x7f.1/",
     "http://169.254.169.254/latest/meta-data/", "//10.0.0.1/", "http://inside.example/", "file:///etc/passwd",
     "http://[::1", "gopher://10.0.0.1/", "http://10.0.0.1:8400/v1/jobs"],
)  # fmt: skip
def test_a_redirect_to_a_private_address_is_not_followed(outside, target):
    outside.names |= {"pictures.example": [[PUBLIC]], "inside.example": [["192.168.1.1"]]}
    head = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
    outside.answers = lambda connection: connection.sendall(head)
    with pytest.raises(Refused, match="send the picture itself"):
        fetch("http://pictures.example/x.png")
    assert outside.reached == [PUBLIC]


def test_redirects_in_a_circle_end(outside):
    outside.names["pictures.example"] = [[PUBLIC]]
    head = b"HTTP/1.1 302 Found\r\nLocation: http://pictures.example/\r\nContent-Length: 0\r\n\r\n"
    outside.answers = lambda connection: connection.sendall(head)
    with pytest.raises(Refused, match="too many redirects"):
        fetch("http://pictures.example/x.png")


def test_a_name_that_changes_its_address_leads_only_to_the_checked_one(outside):
    outside.names["rebound.example"] = [[PUBLIC], ["127.0.0.1"]]
    outside.answers = lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
    assert fetch("http://rebound.example/") == b"x"
    assert outside.reached == [PUBLIC]
    with pytest.raises(Refused, match="not a public address"):
        fetch("http://rebound.example/")


def test_a_name_with_one_private_address_among_public_ones_is_refused(outside):
    outside.names["mixed.example"] = [[PUBLIC, "10.0.0.1"]]
    with pytest.raises(Refused, match="not a public address"):
        fetch("http://mixed.example/")
    assert outside.reached == []


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"], ids=["head", "body"])
def test_a_download_that_sends_single_bytes_is_ended(outside, head, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    outside.names["slow.example"] = [[PUBLIC]]

    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(200):
            try:
                connection.sendall(b"x")
            except OSError:
                return
            time.sleep(0.1)

    outside.answers = drip
    began = time.monotonic()
    with pytest.raises(Refused, match="TimeoutError"):
        fetch("http://slow.example/")
    assert time.monotonic() - began < 10


def test_a_download_that_is_too_large_is_not_read_to_its_end(outside, monkeypatch):
    monkeypatch.setattr(module, "MOST", 1 << 20)
    outside.names["large.example"] = [[PUBLIC]]

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                connection.sendall(b"x" * 65536)
        except OSError:
            pass

    outside.answers = pour
    with pytest.raises(Refused, match="more than 1 MiB"):
        fetch("http://large.example/")


def test_private_addresses_are_refused_with_fetch_and_all_urls_without(tmp_path, start_server):
    for fetches, words in ((True, "is not a public address"), (False, "this server downloads no pictures")):
        settings = Settings(tmp_path / str(fetches), models=("pocket",), fetch=fetches)
        served = start_server(settings, engine="input()")
        body = {"prompt": "x", "image": "http://[::ffff:127.0.0.1]/x.png"}
        status, _, answer = served.ask("POST", "/v1/jobs", body)
        assert (status, words in answer["error"]["message"]) == (400, True)
        served.stop()
