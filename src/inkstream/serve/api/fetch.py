"""Pictures by URL, where a server was told to fetch them: only from public addresses, and never more than is taken."""

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
SECONDS = 15.0
"""From a connection to its last byte, at each address on the way."""
HOPS = 3
GLOBAL = IPv6Network("2000::/3")
"""All that IANA has given out of IPv6; what lies outside is local or reserved (RFC 4291)."""
TRANSLATED = IPv6Network("64:ff9b::/96")
"""IPv4 addresses inside IPv6 (RFC 6052), which a gateway may lead back into a private network."""
SPECIAL = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments (RFC 6890), which `is_global` takes in parts for public
    IPv4Network("192.88.99.0/24"),  # relays of 6to4 (RFC 7526)
    IPv6Network("3fff::/20"),  # documentation (RFC 9637)
)


def fetch(url: str) -> bytes:
    """The bytes at an http or https URL. Refused where its host is not a public one, or it is too large or slow.

    The address is looked up once, checked, and that very address is connected to, at every redirect anew: a name that
    changes its mind meanwhile leads nowhere else.
    """
    for _ in range(HOPS):
        answer = _get(url)
        if isinstance(answer, bytes):
            return answer
        url = answer
    raise Refused(400, f"{_short(url)} leads from one address to the next: send the picture itself")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of the open internet: not this machine, its network, or a cloud's inside."""
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
    """The bytes, or where they are instead."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        connection = http.client.HTTPConnection(host := parts.hostname or "", port)
    except (KeyError, ValueError, http.client.InvalidURL):
        raise Refused(400, f"{_short(url)} is no http or https address: send the picture itself") from None
    if port not in (80, 443) or parts.username is not None:
        raise Refused(400, f"{_short(url)} names a port or a user: send the picture itself")
    try:
        plain = _connect(host, port)
        with _hung_up_after(SECONDS, plain):
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
        raise Refused(400, f"{_short(url)} cannot be fetched ({reason}): send the picture itself") from None
    finally:
        connection.close()
    if len(data) > MOST:
        raise Refused(400, f"{_short(url)} has more than {MOST >> 20} MiB: scale it down first")
    return data


@contextmanager
def _hung_up_after(seconds: float, connection: socket.socket) -> Iterator[None]:
    """A connection that lives so long at most, however slowly its bytes come. TimeoutError where that was too short."""
    late = threading.Event()
    with connection.dup() as same:  # which TLS does not take over

        def hang_up() -> None:
            late.set()
            with suppress(OSError):
                same.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(seconds, hang_up)
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
    """A connection to the first address of a host, all of which must be public."""
    addresses = [ip_address(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused(400, f"{_short(host)} is not a public address: send the picture itself")
    return socket.create_connection((str(addresses[0]), port), timeout=SECONDS)


def _short(url: str) -> str:
    """An address as messages name it: without what follows its path, which may be secret."""
    return "".join(c for c in url.partition("?")[0][:100] if c.isprintable())
