"""Downloads pictures by URL, if the server has --fetch: only from public addresses and up to a size limit."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urljoin, urlsplit

from inkstream.serve.errors import Refused

MOST = 32 << 20
"""Largest download in bytes."""
SECONDS = 15.0
"""Time limit for each address, from the connection to the last byte."""
HOPS = 3
"""Most requests for one URL, redirects included."""
GLOBAL = IPv6Network("2000::/3")
"""The IPv6 addresses that IANA has allocated; all others are local or reserved (RFC 4291)."""
TRANSLATED = IPv6Network("64:ff9b::/96")
"""IPv4 addresses in IPv6 (RFC 6052): a gateway may route them into a private network."""
SPECIAL = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments (RFC 6890); `is_global` counts some of them as public
    IPv4Network("192.88.99.0/24"),  # 6to4 relays (RFC 7526)
    IPv6Network("3fff::/20"),  # documentation (RFC 9637)
)


def fetch(url: str) -> bytes:
    """Download the bytes at an http or https URL.

    The host's addresses are looked up once and checked, and the connection goes to a checked address. This happens for
    each redirect, so a name that changes its address (DNS rebinding) cannot lead to a private one. Raises Refused if
    the host is not public, or the answer is an error, too large or too slow.
    """
    for _ in range(HOPS):
        answer = _get(url)
        if isinstance(answer, bytes):
            return answer
        url = answer
    raise Refused(400, f"{_short(url)} is reached after too many redirects: send the picture itself")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is on the public internet, not on this machine, a private network or inside a cloud."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in TRANSLATED:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in GLOBAL:
            return False
    special = any(address in network for network in SPECIAL)
    return address.is_global and not (address.is_multicast or address.is_reserved or special)


def _get(url: str) -> bytes | str:
    """The bytes at a URL, or the URL that it redirects to."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        connection = http.client.HTTPConnection(host := parts.hostname or "", port)
    except (KeyError, ValueError, http.client.InvalidURL):
        raise Refused(400, f"{_short(url)} is not an http or https URL: send the picture itself") from None
    if port not in (80, 443) or parts.username is not None:
        raise Refused(400, f"{_short(url)} has a port or a user name: send the picture itself")
    try:
        plain = _connect(host, port)
        with _closed_after(SECONDS, plain):
            secure = parts.scheme == "https"
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "inkstream"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return urljoin(url, answer.getheader("Location") or "")
            if answer.status != 200:
                raise Refused(400, f"{_short(url)} answered {answer.status}: send the picture itself")
            data = answer.read(MOST + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = type(error).__name__
        raise Refused(400, f"{_short(url)} cannot be downloaded ({reason}): send the picture itself") from None
    finally:
        connection.close()
    if len(data) > MOST:
        raise Refused(400, f"{_short(url)} has more than {MOST >> 20} MiB: scale it down first")
    return data


@contextmanager
def _closed_after(seconds: float, connection: socket.socket) -> Iterator[None]:
    """Shut the connection down after so many seconds, and then raise TimeoutError.

    A socket's own timeout would start again with each byte.
    """
    late = threading.Event()
    with connection.dup() as same:  # a second handle, because the TLS socket takes over the first one

        def shut_down() -> None:
            late.set()
            with suppress(OSError):
                same.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(seconds, shut_down)
        watch.start()
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError):
            if not late.is_set():
                raise
        finally:
            watch.cancel()
    if late.is_set():
        raise TimeoutError


def _connect(host: str, port: int) -> socket.socket:
    """A connection to the host's first address. Raises Refused unless all its addresses are public."""
    addresses = [ip_address(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused(400, f"{_short(host)} is not a public address: send the picture itself")
    return socket.create_connection((str(addresses[0]), port), timeout=SECONDS)


def _short(url: str) -> str:
    """A URL for messages: printable, at most 100 characters, and without its query, which may be secret."""
    return "".join(c for c in url.partition("?")[0][:100] if c.isprintable())
