"""Every route of a server with keys, sockets too, asked without a key and with headers that try to get around that.

    python scripts/serve_headers.py --date 2026-11-29 [--record serve-headers]

It is tried with the oldest packages that pyproject.toml allows, with the oldest of those it names beside the newest of
those it does not, and with the newest of all: `uv` makes an environment of each, and this file runs in it (`--here`).
The record has a row for each route, with what it answers to a key, and one for each case: how many routes gave which
status; a socket that opens gives 101. Each case is asked through a socket of the network, with the very bytes, and of
the application itself, which gets what no server lets through, too. An answer that should have been refused is named in
`unguarded`, and the script ends with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("fastapi", "uvicorn", "python-multipart", "prometheus-client", "websockets", "pydantic", "pillow",
          "numpy")  # fmt: skip
"""Packages of pyproject.toml that the server imports; its engine, which it does not need here, wants more."""
SHOWN = ("fastapi", "starlette", "uvicorn", "h11", "websockets", "python-multipart", "pydantic")
RESOLUTIONS = {"oldest": "lowest", "oldest named": "lowest-direct", "newest": "highest"}
"""Environment -> its name in uv's option `--resolution`."""
IDLE = "import sys; sys.stdin.read()"
"""Replaces the engine by a process that only waits."""
GOOD = "localhost"
WAYS = {"socket": "", "scope": "", "scope below /studio": "/studio"}
"""Way to send a request -> root path of the application."""
Route = tuple[str, str]
"""Method, WS where it is a socket that is opened, and path."""
OPENS = (("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
         ("Sec-WebSocket-Key", "aW5rc3RyZWFtIGFza3MhIQ=="))  # fmt: skip
"""Headers with which a client opens a socket."""


@dataclass(frozen=True)
class Case:
    """One kind of request without a key."""

    headers: tuple[tuple[str, str], ...] = (("Host", GOOD),)
    before: str = ""  # text before the path in the request's target
    after: str = ""  # text after the path
    refused: bool = False  # the server must refuse the request, at open paths too

    def target(self, route: Route) -> str:
        """Return the request's target."""
        return self.before + route[1] + self.after


def host(*names: str) -> Case:
    """Return a case with Host headers that the server must refuse."""
    return Case(tuple(("Host", name) for name in names), refused=True)


def beside(name: str, value: str) -> Case:
    """Return a case with a good Host and one more header."""
    return Case((("Host", GOOD), (name, value)))


BAD_HOSTS = (
    "x?", "x#", "x/studio/?", "x/studio/#", "localhost/x?", "localhost/studio/?", "localhost/healthz?",
    "localhost/openapi.json#", "localhost/?", "localhost:8400/studio/?", "x@localhost", "user:word@localhost",
    "http://localhost", "localhost,x", "local host", "localhost:x", "localhost:", "[::1", "::1", "x\\studio\\", "%2f",
    "",
)  # fmt: skip
CASES: dict[str, Case] = {
    "a good Host": Case(),
    "no Host": Case(()),
    **{f"Host: {name}": host(name) for name in BAD_HOSTS},
    "Host: localhost, Host: localhost": host(GOOD, GOOD),
    "Host: localhost, Host: x/studio/?": host(GOOD, "x/studio/?"),
    "target http://evil.example/...": Case(before="http://evil.example", refused=True),
    "target http://localhost/...": Case(before="http://localhost", refused=True),
    "target http://x/studio/?...": Case(before="http://x/studio/?", refused=True),
    "target *": Case(before="*", refused=True),
    "target //...": Case(before="/"),
    "target /healthz/../...": Case(before="/healthz/.."),
    "target /healthz%3f/...": Case(before="/healthz%3f"),
    "target /studio/../...": Case(before="/studio/.."),
    "target .../": Case(after="/"),
    "target ...%3f/studio/": Case(after="%3f/studio/"),
    "target ...?until=9999999999&signature=": Case(after="?until=9999999999&signature="),
    **{f"{name}: {value}": beside(name, value) for name, value in (
        ("X-Forwarded-Host", "localhost/studio/?"),
        ("X-Forwarded-Prefix", "/studio"),
        ("X-Forwarded-Path", "/healthz"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Forwarded-Proto", "https"),
        ("X-Script-Name", "/studio"),
        ("X-Original-URL", "/healthz"),
        ("X-Rewrite-URL", "/healthz"),
        ("X-HTTP-Method-Override", "OPTIONS"),
        ("Forwarded", "for=127.0.0.1;host=localhost"),
        ("Origin", "http://localhost"),
        ("Upgrade", "websocket"),
        ("Authorization", "Bearer"),
        ("Authorization", "Bearer ink_00000000_" + "a" * 43),
        ("Authorization", "Basic YTpi"),
        ("Cookie", "inkstream_key=ink_00000000_" + "a" * 43),
    )},
}  # fmt: skip


def routes(app: Any) -> list[Route]:
    """Return all routes of the application, also undocumented ones, with `x` for parameters, and some unknown paths."""
    from inkstream.serve.app import ROUTERS

    every = [*app.routes, *(route for router in ROUTERS for route in router.routes)]
    found = {
        (method, route.path)
        for route in every
        if hasattr(route, "path")
        for method in getattr(route, "methods", ("WS",))
    }
    found |= {("GET", "/nothing"), ("GET", "/v1"), ("GET", "/docs"), ("GET", "/studio"), ("OPTIONS", "/v1/jobs")}
    return sorted((method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in found)


def is_open(path: str) -> bool:
    """Return whether a path needs no key. This follows the server's documentation and is independent of its code."""
    return path in ("/", "/healthz", "/readyz", "/openapi.json") or path.startswith("/studio/")


def guarded(case: Case, route: Route, status: int) -> bool:
    """Whether an answer without a key is one that gives nothing away."""
    if route[0] == "WS":
        return 400 <= status < 500
    if case.refused:
        return status in (400, 401)
    if is_open(unquote(case.target(route).partition("?")[0])):
        return status != 500 if is_open(route[1]) else status in (404, 405)
    return status == 401


async def ask(app: Any, route: Route, case: Case, root: str = "") -> int:
    """Call the application without a server and return the status. root: the application's root path."""
    target, _, query = case.target(route).partition("?")
    is_socket = route[0] == "WS"
    kind = {"type": "websocket", "scheme": "ws", "subprotocols": []} if is_socket else {
        "type": "http", "scheme": "http", "method": route[0]}  # fmt: skip
    scope = {
        **kind, "asgi": {"version": "3.0"}, "http_version": "1.1",
        "path": root + unquote(target), "raw_path": (root + target).encode(), "query_string": query.encode(),
        "root_path": root, "headers": [(name.lower().encode(), value.encode()) for name, value in case.headers],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8400),
    }  # fmt: skip
    status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    connect, leave = {"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1005}
    request, end = {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}
    messages = iter([connect if is_socket else request])

    async def receive() -> dict[str, Any]:
        if message := next(messages, None):
            return message
        await asyncio.wait([status])
        return leave if is_socket else end  # ends an answer that would last, as events do

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            status.set_result(message["status"])
        elif message["type"] in ("websocket.accept", "websocket.close") and not status.done():
            status.set_result(101 if message["type"] == "websocket.accept" else 403)

    with suppress(Exception):  # a server would answer 500
        await asyncio.wait_for(app(scope, receive, send), 20)
    return status.result() if status.done() else 500


def ask_socket(port: int, route: Route, case: Case) -> int:
    """Send the raw bytes of a request to a server and return the status."""
    protocol = "HTTP/1.1" if any(name == "Host" for name, _ in case.headers) else "HTTP/1.0"
    more = OPENS if route[0] == "WS" else (("Connection", "close"), ("Content-Length", "0"))
    method = route[0].replace("WS", "GET")
    lines = [f"{method} {case.target(route)} {protocol}", *(f"{name}: {value}" for name, value in case.headers + more)]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        with connection.makefile("rb") as answer:
            return int(answer.readline().split()[1])


def try_all(app: Any, port: int) -> list[dict[str, Any]]:
    """Run all cases and return a row for each. app: the application of the server at `port`, which has keys."""
    every = routes(app)
    rows = []
    for name, case in CASES.items():
        found = {way: asyncio.run(_ask_all(app, every, case, root)) for way, root in WAYS.items() if way != "socket"}
        found["socket"] = {route: ask_socket(port, route, case) for route in every}
        rows.append(tell(name, case, found))
    return rows


async def _ask_all(app: Any, every: Iterable[Route], case: Case, root: str) -> dict[Route, int]:
    return {route: await ask(app, route, case, root) for route in every}


def tell(name: str, case: Case, found: Mapping[str, Mapping[Route, int]]) -> dict[str, Any]:
    """Return the row of one case: the number of routes for each status, for routes with and without a key."""

    def count(way: str, wanted: bool) -> str:
        numbers = Counter(status for route, status in found[way].items() if is_open(route[1]) == wanted)
        return ", ".join(f"{number} x {status}" for status, number in sorted(numbers.items()))

    def counts(wanted: bool) -> str:
        several = {way: count(way, wanted) for way in WAYS}
        same = len(set(several.values())) == 1
        return several["socket"] if same else "; ".join(f"{way} {text}" for way, text in several.items())

    answers = [(way, route, status) for way in WAYS for route, status in found[way].items()]
    wrong = [
        f"{way} {m} {path}: {status}" for way, (m, path), status in answers if not guarded(case, (m, path), status)
    ]
    return {"case": name, "routes that need a key": counts(False), "open routes": counts(True), "unguarded": wrong}


def run_here() -> dict[str, Any]:
    """Run the whole test with the installed packages. Returns versions, routes and rows."""
    import uvicorn

    from inkstream.serve.app import build
    from inkstream.serve.connections import Connection
    from inkstream.serve.engines.process import EngineProcess
    from inkstream.serve.keys import add_key
    from inkstream.serve.limits import Settings

    logging.disable()  # no log lines for refused requests
    with tempfile.TemporaryDirectory() as folder:
        key = add_key(Path(folder) / "keys.json", "root", 0.0, admin=True)
        engine = partial(EngineProcess, command=(sys.executable, "-c", IDLE))
        app = build(Settings(Path(folder), models=("pocket",)), engine)
        config = uvicorn.Config(app, "127.0.0.1", 0, http=Connection, log_config=None, timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise SystemExit("the server did not start")
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        with_key = beside("Authorization", f"Bearer {key}")
        reached = {f"{m} {path}": ask_socket(port, (m, path), with_key) for m, path in routes(app)}
        rows = try_all(app, port)
        app.state.service.jobs.feed.close()
        server.should_exit = True
        thread.join(20)
    return {"versions": {name: version(name) for name in SHOWN}, "routes": reached, "rows": rows}


def requirements() -> list[str]:
    """Return the requirements in pyproject.toml for the packages that the server imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [line for line in project["dependencies"] if re.split(r"[<>=]", line)[0] in NEEDED]


def run_in(resolution: str, folder: Path) -> dict[str, Any]:
    """Make an environment in the folder and run the test in it."""
    python = folder / "bin" / "python"
    uv = {**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    subprocess.run(["uv", "venv", "-q", "--python", sys.executable, folder], check=True, env=uv)
    install = ["uv", "pip", "install", "-q", "--python", python, "--resolution", resolution, *requirements()]
    subprocess.run(install, check=True, env=uv)
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([python, __file__, "--here"], check=True, env=here, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", help="date of the record")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--here", action="store_true", help="run only with the installed packages; prints JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run_here()))
        return 0
    if args.record and not args.date:
        parser.error("--record needs --date")
    if shutil.which("uv") is None:
        parser.error("uv is not installed, and pip cannot choose the oldest packages: pip install uv")
    rows, peers, problems = [], {}, 0
    reached: dict[str, dict[str, int]] = {}
    for name, resolution in RESOLUTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = run_in(resolution, Path(folder) / "env")
        peers[name] = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
        rows += [{"versions": name, **row} for row in found["rows"]]
        for route, status in found["routes"].items():
            reached.setdefault(route, {})[name] = status
        wrong = [f"{row['case']}: {line}" for row in found["rows"] for line in row["unguarded"]]
        wrong += [f"{route} refuses the valid key" for route, status in found["routes"].items() if status == 401]
        problems += len(wrong)
        print(f"{name} ({peers[name]}): {len(found['routes'])} routes, {len(CASES)} cases, {len(wrong)} unguarded")
        print("".join(f"  {line}\n" for line in wrong[:50]), end="")
    if args.record:
        from inkstream.bench.records import write_record

        command = f"python scripts/serve_headers.py --date {args.date} --record {args.record}"
        of_routes = [
            {"route": route, "needs a key": not is_open(route.partition(" ")[2]), "with a key": statuses}
            for route, statuses in reached.items()
        ]
        print(write_record(args.record, args.date, command, peers, of_routes + rows, ROOT / "benchmarks" / "records"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
