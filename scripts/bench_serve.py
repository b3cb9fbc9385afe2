"""Benchmark the server with Pocket: its latency per picture, the gain of shared forwards, and its memory.

    python scripts/bench_serve.py --date 2026-11-21 [--samples 60] [--burst 24] [--repeats 3] [--jobs 1000]
        [--record serve-cpu]

1. Latency: a client requests one picture at a time, over OpenAI's route and as a job with its events. The engine
   reports how long it drew; the rest of the client's wait is the server's latency.
2. Throughput: a burst of mixed jobs on a server that draws four at once and on one that draws one at a time, in turn.
3. Memory: many small jobs on one server, while the memory of its two processes is measured.
The script needs Linux, because it finds the engine's process in /proc.
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
"""Number of memory measurements."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--samples", type=int, default=60, help="pictures of the latency test, for each route")
    parser.add_argument("--burst", type=int, default=24, help="jobs of a burst")
    parser.add_argument("--repeats", type=int, default=3, help="bursts on each server")
    parser.add_argument("--jobs", type=int, default=1000, help="small jobs of the memory test")
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
    """Start a server that draws `slots` jobs at once, and wait until its model is loaded."""
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
    except Exception:  # the server does not listen yet
        return False


# Latency ------------------------------------------------------------------------------------------------------------


def time_waits(server: Server, samples: int) -> list[dict[str, Any]]:
    """Measure the milliseconds that a client waits in addition to the drawing, over both routes in turn."""
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
    note = f"the drawing itself took {median(drawn):.0f} ms"
    return [row(way, "ms in addition to the drawing", measured, note) for way, measured in waits.items()]


def generate(connection: http.client.HTTPConnection, body: dict[str, Any]) -> dict[str, Any]:
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    if answer.status != 200:
        raise SystemExit(f"the server answered {answer.status}: {content}")
    return content


def follow(server: Server, fields: dict[str, Any]) -> dict[str, Any]:
    """Send a job, follow its events until it ends, and return the data of its last event."""
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
        raise SystemExit(f"job {job['id']} did not succeed: {name or 'its events stopped'}")
    return json.loads(value)


# Throughput ---------------------------------------------------------------------------------------------------------


def time_bursts(server: Server, lone: Server, burst: int, repeats: int) -> list[dict[str, Any]]:
    """Measure the seconds until a burst of mixed jobs is drawn, four at once and one at a time, in turn."""
    ways = {"four at once": server, "one at a time": lone}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, one in ways.items():
            times[way].append(time_burst(one, burst))
    ratio = median(times["one at a time"]) / median(times["four at once"])
    notes = {"four at once": f"{ratio:.2f} times as many pictures per second", "one at a time": "--slots 1"}
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


# Memory -------------------------------------------------------------------------------------------------------------


def watch_memory(server: Server, jobs: int) -> list[dict[str, Any]]:
    """Measure the memory of both processes in MiB while small jobs are drawn."""
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
        raise SystemExit("the engine died during the test")
    return [
        row(f"memory of the {name}, {jobs:,} jobs", "MiB", sizes, f"after each tenth: {', '.join(map(whole, sizes))}")
        for name, sizes in seen.items()
    ]


def resident(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def whole(number: float) -> str:
    return f"{number:.0f}"


def percentile_95(measured: Sequence[float]) -> float:
    return quantiles(measured, n=20, method="inclusive")[-1] if len(measured) > 1 else measured[0]


def row(what: str, unit: str, measured: Sequence[float], note: str) -> dict[str, Any]:
    """Return one measurement as a row and print it."""
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
