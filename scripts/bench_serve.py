"""Measure the server under load, with Pocket: what it adds to a picture, what sharing forwards gives, what it keeps.

    python scripts/bench_serve.py --date 2026-11-21 [--samples 60] [--burst 24] [--repeats 3] [--jobs 1000]
        [--record serve-cpu]

One: pictures are asked for one at a time, over OpenAI's route and as jobs whose events are followed; the engine says
with each how long it drew, and what the client waited beyond that is the server's. Two: a burst of mixed jobs at once,
on a server that draws one at a time and on one that draws four, in turn. Three: many small jobs on one server, and the
memory of its two processes on the way. Linux: it finds the engine in /proc.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from serve_faults import Server

ONE = {"prompt": "a red circle", "model": "pocket", "steps": 8}
MIXED = [
    {"prompt": "a red circle", "width": 64, "height": 64, "steps": 4, "guidance": 1.0},
    {"prompt": "a blue square above a green triangle", "width": 128, "height": 128, "steps": 8},
    {"prompt": "three yellow stars on a black background", "width": 96, "height": 96, "steps": 8},
    {"prompt": "two orange hearts", "width": 128, "height": 64, "steps": 12, "guidance": 1.0},
]
TINY = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 1, "guidance": 1.0}
EVERY = 10
"""Memory is noted so many times."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", default="", help="the day, for the record")
    parser.add_argument("--samples", type=int, default=60, help="pictures asked for one at a time, either way")
    parser.add_argument("--burst", type=int, default=24, help="jobs at once")
    parser.add_argument("--repeats", type=int, default=3, help="bursts on either server")
    parser.add_argument("--jobs", type=int, default=1000, help="small jobs, for the memory")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with serving(4) as server, serving(1) as lone:
        rows = [*time_waits(server, options.samples), *time_bursts(server, lone, options.burst, options.repeats)]
    with serving(4) as server:
        rows += watch_memory(server, options.jobs)
    if options.record:
        from inkstream.bench.records import write_record

        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


@contextmanager
def serving(slots: int) -> Iterator[Server]:
    """A server that draws so many jobs at once, with its model loaded."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data", ("--slots", str(slots), "--queue", "1000"))
        server.start()
        try:
            while not is_ready(server):
                time.sleep(0.2)
            for fields in (ONE, *MIXED, TINY) * 2:
                follow(server, fields)
            yield server
        finally:
            server.stop()


def is_ready(server: Server) -> bool:
    try:
        return server.ask("GET", "/healthz")["model"] == "pocket"
    except Exception:  # it does not listen yet
        return False


# What it adds to a picture ------------------------------------------------------------------------------------------


def time_waits(server: Server, samples: int) -> list[dict[str, Any]]:
    """Milliseconds that a client waits beyond the drawing, over each way in, in turn."""
    waits: dict[str, list[float]] = {"POST /v1/images/generations": [], "POST /v1/jobs, then its events": []}
    drawn: list[float] = []
    openai = http.client.HTTPConnection("127.0.0.1", server.port)
    for seed in range(samples):
        for way, measured in waits.items():
            began = time.perf_counter()
            if way.endswith("generations"):
                picture = generate(openai, {**ONE, "seed": seed})["data"][0]["inkstream"]
            else:
                (picture,) = follow(server, {**ONE, "seed": seed})["pictures"]
            measured.append(1000 * (time.perf_counter() - began - picture["seconds"]))
            drawn.append(1000 * picture["seconds"])
    openai.close()
    note = f"the picture itself took {median(drawn):.0f} ms"
    return [row(way, "ms beyond the drawing", measured, note) for way, measured in waits.items()]


def generate(connection: http.client.HTTPConnection, body: dict[str, Any]) -> dict[str, Any]:
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    if answer.status != 200:
        raise SystemExit(f"the server answered {answer.status}: {content}")
    return content


def follow(server: Server, fields: dict[str, Any]) -> dict[str, Any]:
    """A job from its acceptance to its end, as its events tell."""
    job = server.ask("POST", "/v1/jobs", fields)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", f"/v1/jobs/{job['id']}/events")
    answer = connection.getresponse()
    name = ""
    while line := answer.readline().decode():
        kind, _, value = line.rstrip("\n").partition(": ")
        if kind == "event":
            name = value
        elif kind == "data" and name in ("succeeded", "failed", "cancelled"):
            break
    connection.close()
    if name != "succeeded":
        raise SystemExit(f"{job['id']} has {name or 'no end'}")
    return json.loads(value)


# What sharing forwards gives ----------------------------------------------------------------------------------------


def time_bursts(server: Server, lone: Server, burst: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds until a burst of mixed jobs is drawn, four at once and one at a time, in turn."""
    ways = {"four at once": server, "one at a time": lone}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, one in ways.items():
            times[way].append(time_burst(one, burst))
    ratio = median(times["one at a time"]) / median(times["four at once"])
    notes = {"four at once": f"{ratio:.2f} times as many pictures in a second", "one at a time": "--slots 1"}
    return [row(f"{burst} mixed jobs, {way}", "s", times[way], notes[way]) for way in ways]


def time_burst(server: Server, burst: int) -> float:
    began = time.perf_counter()
    for seed, fields in zip(range(burst), itertools.cycle(MIXED)):
        server.ask("POST", "/v1/jobs", {**fields, "seed": seed})
    wait_until_drawn(server)
    return time.perf_counter() - began


def wait_until_drawn(server: Server) -> None:
    while (queue := server.ask("GET", "/v1/queue"))["running"] or queue["queued"]:
        time.sleep(0.05)


# What it keeps ------------------------------------------------------------------------------------------------------


def watch_memory(server: Server, jobs: int) -> list[dict[str, Any]]:
    """MiB of both processes while small jobs are drawn."""
    (engine,) = server.engines()
    assert server.process is not None
    processes = {"server": server.process.pid, "engine": engine}
    seen: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(EVERY):
        for seed in range(jobs // EVERY):
            server.ask("POST", "/v1/jobs", {**TINY, "seed": seed})
        wait_until_drawn(server)
        for name, process in processes.items():
            seen[name].append(resident(process))
    if server.engines() != [engine]:
        raise SystemExit("the engine died meanwhile")
    return [
        row(f"memory of the {name}, {jobs:,} jobs", "MiB", sizes, f"after each tenth: {', '.join(map(whole, sizes))}")
        for name, sizes in seen.items()
    ]


def resident(process: int) -> float:
    """MiB of a process that are in memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def whole(number: float) -> str:
    return f"{number:.0f}"


def percentile_95(measured: Sequence[float]) -> float:
    return quantiles(measured, n=20, method="inclusive")[-1] if len(measured) > 1 else measured[0]


def row(what: str, unit: str, measured: Sequence[float], note: str) -> dict[str, Any]:
    """One measurement; it is printed, too."""
    found = {
        "what": what,
        "unit": unit,
        "samples": len(measured),
        "median": round(median(measured), 3),
        "p95": round(percentile_95(measured), 3),
        "least": round(min(measured), 3),
        "most": round(max(measured), 3),
        "note": note,
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
