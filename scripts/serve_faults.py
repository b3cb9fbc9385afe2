"""Fault test of the server: clients request pictures while the engine and the server are killed again and again.

    python scripts/serve_faults.py --date 2026-11-21 [--kills 1000] [--each 20] [--clients 8] [--seed 0]
        [--record serve-faults-cpu]

A round has `--each` kills and uses a new folder. At its end everything is checked: each accepted job has ended exactly
once, each picture can be opened and matches its record, and the folder holds no other files. Then the record is
written. The same command continues after the rounds that are in the record, so it can be interrupted. The script needs
Linux, because it finds the engine as the server's child process in /proc.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import random
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from PIL import Image

from inkstream.serve.engines.process import COMMAND

REQUEST = {"prompt": "a red circle", "model": "pocket", "width": 64, "height": 64, "steps": 4, "count": 2}
AHEAD = 2
"""Jobs that a client keeps waiting while kills are still to come."""
ANY = 0.7
"""Share of the kills at a random moment. For the rest, the test waits until a job is being drawn."""
SERVERS = 0.3
"""Share of the kills that hit the server. The rest hit the engine."""
DRAWN = "SELECT count(*) FROM pictures"
RUNNING = "SELECT count(*) FROM jobs WHERE state = 'running'"
DYING = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running') AND deaths > 3"
"""Jobs that the server will soon fail, as it should, because too many engines died while drawing them."""
START = 3.0
"""Approximate start time of an engine in seconds."""
PATIENCE = 900.0
"""Time limit in seconds for each wait."""


class Down(Exception):
    """The server did not answer, or its answer was incomplete."""


@dataclass
class Server:
    """A server in a separate process. Its data are in `folder`; it draws with Pocket."""

    folder: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server. Each start uses the same port."""
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        words = ["serve", "--port", str(self.port), "--data", str(self.folder), "--model", "pocket", *self.options]
        with (self.folder.parent / "log.txt").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "inkstream", *words], stdout=log, stderr=log)

    def stop(self) -> None:
        """Stop the server cleanly with SIGTERM, and wait for its end."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(30)

    def kill(self) -> None:
        """Kill the server with SIGKILL, as in a power cut."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def engines(self) -> list[int]:
        """Return the ids of the server's engine processes: one, or none during a restart."""
        assert self.process is not None
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(c) for c in children if COMMAND[-1].encode() in Path(f"/proc/{c}/cmdline").read_bytes()]
        except OSError:
            return []

    def kill_engine(self) -> bool:
        """Kill the engine with SIGKILL. Returns whether there was an engine."""
        engines = self.engines()
        for engine in engines:
            with suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        return bool(engines)

    def ask(self, method: str, path: str, body: Any = None, token: str = "") -> Any:
        """Send a request. Returns the answer's JSON, or its bytes. Raises Down if there is no answer."""
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": token} if token else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
                return json.loads(content) if "json" in answer.headers["Content-Type"] else content
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path} answered {error.code}: {error.read()!r}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise Down(str(error)) from None


class Ordeal:
    """One round of the fault test: the server, its clients and the problems found."""

    def __init__(self, folder: Path, seed: int | str):
        self.server = Server(folder)
        self.seed = seed
        self.accepted: dict[str, str] = {}  # idempotency key -> job id
        self.ended: dict[str, dict[str, Any]] = {}  # job id -> the job when a client first saw its end
        self.problems: list[str] = []
        self.over = threading.Event()  # no more kills will come

    def client(self, number: int) -> None:
        """Send jobs, with retries, until the last kill, then wait until all of them have ended."""
        dice = random.Random(f"{self.seed}-{number}")
        mine: list[str] = []  # jobs whose end this client has not seen yet
        for job in itertools.count():
            while len(mine) >= AHEAD or (self.over.is_set() and mine):
                with suppress(Down):
                    seen = self.server.ask("GET", f"/v1/jobs/{mine[0]}")
                    if seen["ended"]:
                        self.ended[mine.pop(0)] = seen
                        continue
                time.sleep(0.3)
            if self.over.is_set():
                return
            token = f"client-{number}-job-{job}"
            while token not in self.accepted:
                try:
                    body = REQUEST | {"seed": 10_000 * number + 10 * job}
                    self.accepted[token] = self.server.ask("POST", "/v1/jobs", body, token)["id"]
                except Down:
                    time.sleep(0.2)
            mine.append(self.accepted[token])
            time.sleep(dice.uniform(0, 0.5))

    def run(self, clients: int, engine_kills: int, server_kills: int) -> dict[str, Any]:
        """Run the round. Returns its sums; `problems` is empty if all checks passed."""
        began = time.monotonic()
        self.server.folder.mkdir(parents=True)
        self.server.start()
        dice = random.Random(self.seed)
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        kills = ["engine"] * engine_kills + ["server"] * server_kills
        dice.shuffle(kills)
        at_work = 0
        for kill in kills:
            if dice.random() < ANY:  # at a random moment, which may be during a start
                time.sleep(dice.uniform(0, START))
            else:  # while a picture is being drawn
                before = self._count(DRAWN)
                self._wait_for(lambda before=before: self._count(DRAWN) > before)
                time.sleep(dice.uniform(0, 0.4))
            self._wait_for(lambda: not self._count(DYING))
            at_work += self._count(RUNNING) > 0
            if kill == "server":
                self.server.kill()
                self.server.start()
            else:
                self._wait_for(self.server.kill_engine)
        self.over.set()
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                self.problems.append("a client still waits for its jobs")
        self.examine()
        self.server.stop()
        return {
            "jobs": len(self.accepted),
            "clients": clients,
            "engine_kills": engine_kills,
            "server_kills": server_kills,
            "at_work": at_work,
            "pictures": self._count(DRAWN),
            "seconds": round(time.monotonic() - began, 1),
            "problems": self.problems,
        }

    def examine(self) -> None:
        """Compare all promises of the server with its answers and its files. Problems go to `problems`."""
        expect = self.problems.append
        jobs = len(self.accepted)
        if len(set(self.accepted.values())) != jobs:
            expect(f"{jobs} jobs were accepted, {len(set(self.accepted.values()))} exist")
        files = set()
        for token, identity in self.accepted.items():
            job = self.server.ask("GET", f"/v1/jobs/{identity}")
            if self.ended.get(identity) != job:
                expect(f"job {identity} changed after its end")
            if job["state"] != "succeeded":
                expect(f"job {identity} is {job['state']}: {job['error']}")
            if [picture["index"] for picture in job["pictures"]] != list(range(REQUEST["count"])):  # type: ignore[call-overload]
                expect(f"{identity} has pictures {[picture['index'] for picture in job['pictures']]}")
            first = job["request"]["seed"]
            number, _, place = token.removeprefix("client-").partition("-job-")
            if first != 10_000 * int(number) + 10 * int(place):
                expect(f"{identity} is not what {token} asked for")
            for picture in job["pictures"]:
                data = self.server.ask("GET", picture["url"])
                files.add(picture["id"])
                image = Image.open(io.BytesIO(data))
                image.load()
                record = json.loads(image.text["inkstream"])["request"]  # type: ignore[attr-defined]
                told = (picture["sha256"], picture["bytes"], (picture["width"], picture["height"]), picture["seed"])
                found = (hashlib.sha256(data).hexdigest(), len(data), image.size, record["seed"])
                if told != found or picture["seed"] != first + picture["index"]:
                    expect(f"picture {picture['id']} does not match its record: {told} {found}")
        there = {file.stem for file in self.server.folder.glob("pictures/*/*")}
        if there != files:
            expect(f"{len(there ^ files)} files belong to no picture or are missing")
        if rest := list((self.server.folder / "parts").iterdir()):
            expect(f"{len(rest)} half-written files are left")
        with sqlite3.connect(self.server.folder / "inkstream.db") as db:
            states = dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
            damage = db.execute("PRAGMA integrity_check").fetchone()[0]
        db.close()
        if states != {"succeeded": jobs}:
            expect(f"the history has the states {states}")
        if damage != "ok":
            expect(f"the database is damaged: {damage}")

    def _client(self, number: int) -> None:
        try:
            self.client(number)
        except Exception as error:
            self.problems.append(f"client {number}: {error!r}")

    def _wait_for(self, condition: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)

    def _count(self, sql: str) -> int:
        """Return the count of a query. It reads the database directly, because the server may be down."""
        try:
            with closing(sqlite3.connect(f"file:{self.server.folder}/inkstream.db?mode=ro", uri=True)) as db:
                return db.execute(sql).fetchone()[0]
        except sqlite3.Error:
            return 0


def endure(kills: int, each: int, clients: int, seed: int, done: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run rounds until there were `kills` kills. Yields the sums of all rounds after each one.

    done: the sums of earlier rounds, from the record.
    """
    while (before := done.get("engine_kills", 0) + done.get("server_kills", 0)) < kills:
        number = done.get("rounds", 0)
        each = min(each, kills - before)
        servers = round(each * SERVERS)
        with tempfile.TemporaryDirectory() as folder:
            outcome = Ordeal(Path(folder) / "data", f"{seed}-{number}").run(clients, each - servers, servers)
        print(json.dumps(outcome), flush=True)
        outcome["problems"] = len(outcome["problems"])
        sums = {name: value + done.get(name, 0) for name, value in outcome.items() if name != "clients"}
        done = {**sums, "seconds": round(sums["seconds"], 1), "clients": clients, "rounds": number + 1}
        yield done


if __name__ == "__main__":
    from inkstream.bench.records import read_record, write_record  # not at the top, because it imports torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in {"kills": 1000, "each": 20, "clients": 8, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json, and continue after its rounds")
    asked = parser.parse_args()
    command, row = shlex.join(["python", *sys.argv]), dict[str, Any]()
    if asked.record:
        with suppress(FileNotFoundError):
            earlier = read_record(asked.record)
            row = earlier["rows"][0] if earlier["command"] == command else {}
    for sums in endure(asked.kills, asked.each, asked.clients, asked.seed, row):
        row = sums
        if asked.record:
            write_record(asked.record, asked.date, command, {}, [row])
    sys.exit(bool(row.get("problems")))
