"""The server survives hundreds of slow connections, clients that do not read, decompression bombs and nested bodies."""

from __future__ import annotations

import io
import json
import random
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from websockets.sync.client import connect

from inkstream.serve import connections
from inkstream.serve.limits import Limits, Settings

HEAD = b"POST /v1/uploads HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
PIECES = {
    "silent": (b"", b""),
    "half a head": (b"GET /healthz HTTP/1.1\r\nHost: loc", b"a"),
    "half a body": (HEAD + b"Content-Length: 100000\r\n\r\n", b"a"),
    "a chunk without an end": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n", b"a"),
    "half of a second head": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea", b""),
}


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed the connection. Reads and drops all data from the server."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.fixture(scope="module")
def bare(tmp_path_factory, start_server):
    """A server with short time limits, whose engine ignores all messages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "HEAD", 2.0)
        settings = Settings(tmp_path_factory.mktemp("bare"), models=("pocket",), limits=Limits(body_seconds=2.0))
        served = start_server(settings, engine="input()")
        yield served
        served.stop()


def test_a_websocket_has_no_time_limit_for_a_head(bare):
    with connect(f"ws://127.0.0.1:{bare.port}/comfyui/ws") as socket:
        socket.recv(timeout=5)
        with pytest.raises(TimeoutError):  # no message comes, and the socket stays open
            socket.recv(timeout=2 * connections.HEAD)


def test_300_slow_and_half_open_connections_block_nobody_and_are_ended(bare, until):
    began = time.monotonic()
    held = []
    for number in range(300):
        first, more = list(PIECES.values())[number % len(PIECES)]
        connection = socket.create_connection(("127.0.0.1", bare.port), timeout=30)
        connection.sendall(first)
        held.append((connection, more))
    status, _, job = bare.ask("POST", "/v1/jobs", {"prompt": "x", "steps": 1})
    assert (status, job["state"]) == (202, "queued")
    while any(open_ := [pair for pair in held if is_open(pair[0])]):
        assert time.monotonic() - began < 60, len(open_)
        for connection, more in open_:
            try:
                connection.setblocking(True)
                connection.sendall(more)  # single bytes, to look alive
            except OSError:
                pass
        time.sleep(0.3)
    assert bare.ask("GET", "/healthz")[0] == 200
    for connection, _ in held:
        connection.close()


def test_connections_that_are_reset_do_no_harm(bare):
    for first, _ in list(PIECES.values()) * 10:
        connection = socket.create_connection(("127.0.0.1", bare.port), timeout=30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(first)
        connection.close()
    assert bare.ask("GET", "/healthz")[0] == 200


@pytest.fixture(scope="module")
def large(bare):
    """Path and size of a picture of 25 MB, more than the buffers of a socket hold."""
    picture = io.BytesIO()
    Image.frombytes("RGB", (2048, 4096), random.Random(0).randbytes(3 * 2048 * 4096)).save(picture, "BMP")
    status, _, upload = bare.ask("POST", "/v1/uploads", picture.getvalue())
    assert status == 201
    return f"/v1/uploads/{upload['id']}", len(picture.getvalue())


def test_a_client_that_stops_reading_an_answer_is_disconnected(bare, large, monkeypatch, until):
    monkeypatch.setattr(connections, "WRITE", 0.5)
    path, size = large
    with socket.create_connection(("127.0.0.1", bare.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        own = connection.getsockname()
        until(lambda: own in [one.client for one in list(bare.connections)])
        until(lambda: own not in [one.client for one in list(bare.connections)])
        read = 0
        while data := connection.recv(1 << 20):  # what the sockets hold
            read += len(data)
    assert read < size


def test_a_client_that_reads_an_answer_slowly_gets_all_of_it(bare, large, monkeypatch):
    monkeypatch.setattr(connections, "WRITE", 2.0)
    path, size = large
    began, read = time.monotonic(), 0
    with socket.create_connection(("127.0.0.1", bare.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        while data := connection.recv(1 << 20):
            read += len(data)
            time.sleep(len(data) / 5e6)  # 5 s for all of it
    assert read > size
    assert time.monotonic() - began > 2 * connections.WRITE


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, text: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def resized(kind: str, places: list[tuple[int, str, int]]) -> bytes:
    """A small file whose header has an enormous size. places: offset in the header, struct format, false value."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for place, code, value in places:
        struct.pack_into(code, data, place, value)
    return bytes(data)


def jpeg() -> bytes:
    data = resized("JPEG", [])
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 65500, 65500) + data[place + 4 :]


def webp() -> bytes:
    """A WebP whose extended header says 16384 x 16384, the format's maximum."""
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\x3f\0" * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    frame = resized("WEBP", [])[12:]
    data = bytes(6) + b"\xff\x3f\0" * 2 + bytes(4) + frame
    body += b"ANMF" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (40_000, 2)).save(buffer, "TIFF", compression="tiff_deflate")
    data = buffer.getvalue()
    return data.replace(struct.pack("<HHII", 257, 4, 1, 2), struct.pack("<HHII", 257, 4, 1, 40_000))


BOMBS = {
    "PNG": png(60_000, 60_000),
    "PNG with a text of 1 GB": png(16, 16, chunk(b"zTXt", b"inkstream\0\0" + zlib.compress(bytes(1 << 30), 1))),
    "JPEG": jpeg(),
    "WebP": webp(),
    "GIF": resized("GIF", [(6, "<H", 65535), (8, "<H", 65535)]),
    "TIFF": tiff(),
    "BMP": resized("BMP", [(18, "<i", 60_000), (22, "<i", 60_000)]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_in_one_line(bare, name):
    for path in ("/v1/uploads", "/v1/recall"):
        status, _, body = bare.ask("POST", path, BOMBS[name])
        assert status == 400, (path, body)
        assert "\n" not in body["error"]["message"]
    assert bare.ask("GET", "/healthz")[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="reads the most memory a process had, as Linux counts it")
def test_no_decompression_bomb_uses_much_memory(tmp_path):
    program = """import resource, sys
from pathlib import Path
from inkstream.serve.errors import Refused
from inkstream.serve.api.gallery import read_recalled
from inkstream.serve.queue.inputs import examine
from inkstream.serve.limits import Limits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    data = Path(name).read_bytes()
    for read in (lambda: examine(data, '', 0.0, Limits()), lambda: read_recalled(data)):
        try:
            read()
        except Refused:
            pass
    print(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    words = [sys.executable, "-c", program, *BOMBS]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200 * 1024, done.stdout  # KiB


NESTED = {
    "lists": b'{"prompt": "x", "grid": ' + b"[" * 100_000,
    "closed lists": b'{"prompt": "x", "grid": ' + b"[" * 900 + b"]" * 900 + b"}",
    "objects": b'{"a": ' * 50_000,
    "a field within fields": b'{"prompt": ' + b'{"prompt": ' * 500 + b"1" + b"}" * 501,
    "a list at the top": b"[" * 900 + b"]" * 900,
    "a number of many digits": b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    "numbers that are none": b'{"prompt": "x", "guidance": NaN, "shift": Infinity}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a surrogate pair as a model": b'{"prompt": "x", "model": "\\ud800"}',
    "half a surrogate pair as a field": b'{"prompt": "x", "\\ud800": 1}',
    "bytes that are no text": b'{"prompt": "\xff\xfe"}',
}


@pytest.mark.parametrize("name", NESTED)
def test_a_deeply_nested_or_invalid_body_is_refused_in_one_line(bare, name):
    drawing = ("/v1/jobs", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img")
    for path in (*drawing, "/v1/prompts", "/v1/queue"):
        method = "PATCH" if path == "/v1/queue" else "POST"
        status, _, body = bare.ask(method, path, NESTED[name], {"Content-Type": "application/json"})
        assert 400 <= status < 500, (path, status, body)
        assert len(json.dumps(body)) < 2000
    assert bare.ask("GET", "/healthz")[0] == 200
    assert not Path("core").exists()
