"""Test the server on Ray Serve on this machine: two engines behind one address, and one of them can be killed.

    python scripts/serve_ray.py [--jobs 24] [--kill] [--model pocket]

Jobs are sent over HTTP. At the end every job must have succeeded, every picture must be served and match its record,
and more than one engine must have drawn. The script prints one JSON document; the exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import socket
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 600.0
"""Time limit in seconds for each wait."""
REQUEST = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 8}


class Server:
    """HTTP access to the server."""

    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
            return json.loads(content) if "json" in answer.headers["Content-Type"] else content


def attempt(folder: Path, jobs: int, kill: bool, model: str) -> dict[str, Any]:
    """Run the test. Returns its results; `problems` is empty if all checks passed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    from inkstream.serve.ray import ENGINES, app

    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, _node_ip_address="127.0.0.1",
             logging_level=logging.ERROR, log_to_driver=False)  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {
        "data": str(folder),
        "models": model,
        "host": "127.0.0.1",
        "least_engines": 2,
        "most_engines": 2,
        "slots": 2,
    }
    serve.run(app(args))
    server = Server(port)
    wait_until(lambda: server.ask("GET", "/healthz"))
    up = time.monotonic() - began

    handle = serve.get_deployment_handle(ENGINES, "default")
    accepted = [server.ask("POST", "/v1/jobs", REQUEST | {"seed": number})["id"] for number in range(jobs)]
    killed = 0
    if kill:
        wait_until(lambda: len(ended(server, jobs)) >= jobs // 4)
        killed = int(handle.hello.remote().result()["engine"].rpartition(":")[2])
        os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(ended(server, jobs)) == jobs)

    problems = []
    for number, identity in enumerate(accepted):
        job = server.ask("GET", f"/v1/jobs/{identity}")
        if job["state"] != "succeeded" or len(job["pictures"]) != 1:
            problems.append(f"job {number} {job['state']}: {job['error']}")
            continue
        picture = job["pictures"][0]
        if hashlib.sha256(server.ask("GET", picture["url"])).hexdigest() != picture["sha256"]:
            problems.append(f"the picture of job {number} does not match its record")
    drawn = {engine: said["drawn"] for engine, said in greet(handle).items()}
    if not (killed and sum(drawn.values()) < jobs) and sum(count > 0 for count in drawn.values()) < 2:
        problems.append("only one engine has drawn")
    told = follow_and_cancel(server)
    if "step" not in told or told[-1] != "cancelled":
        problems.append(f"the events of a cancelled job were {told}")
    state = leave(server, port)
    if state != "cancelled":
        problems.append(f"the job of a client that disconnected is {state}")
    wait_until(lambda: not any(said["runs"] for said in greet(handle).values()))
    total = server.ask("GET", "/v1/pictures")["total"]
    if total != jobs:
        problems.append(f"{total} pictures are in the history")
    serve.shutdown()
    ray.shutdown()
    seconds = round(time.monotonic() - began, 1)
    return {
        "jobs": jobs,
        "pictures": total,
        "killed": killed,
        "drawn by engine": drawn,
        "cancelled after steps": told.count("step"),
        "up after": round(up, 1),
        "seconds": seconds,
        "problems": problems,
    }


def greet(handle: Any) -> dict[str, Any]:
    """Return engine -> its status. Ray chooses which engine answers a call, so there are many calls."""
    said = [handle.hello.remote().result() for _ in range(30)]
    return {one["engine"].rpartition(":")[2]: one for one in said}


def follow_and_cancel(server: Server) -> list[str]:
    """Cancel a job after three steps and return the names of its events."""
    job = server.ask("POST", "/v1/jobs", REQUEST | {"steps": 200})["id"]
    told = []
    with urllib.request.urlopen(f"{server.address}/v1/jobs/{job}/events", timeout=60) as events:
        for line in events:
            if line.startswith(b"event: "):
                told.append(line[7:].strip().decode())
                if told.count("step") == 3 and told[-1] == "step":
                    server.ask("DELETE", f"/v1/jobs/{job}")
    return told


def leave(server: Server, port: int) -> str:
    """Return the final state of a job whose client disconnects before its pictures are drawn."""
    body = json.dumps({"prompt": "a circle", "size": "64x64", "steps": 200}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.ask("GET", "/v1/jobs?state=running")["jobs"])
    job = server.ask("GET", "/v1/jobs?limit=1")["jobs"][0]["id"]
    wait_until(lambda: server.ask("GET", f"/v1/jobs/{job}")["ended"])
    return server.ask("GET", f"/v1/jobs/{job}")["state"]


def ended(server: Server, jobs: int) -> list[dict[str, Any]]:
    found = server.ask("GET", f"/v1/jobs?limit={min(100, jobs)}")["jobs"]
    return [job for job in found if job["ended"]]


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"the condition was not met within {PATIENCE:.0f} s")
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--model", default="pocket")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = attempt(Path(folder) / "data", given.jobs, given.kill, given.model)
    print(json.dumps(outcome, indent=2))
    return 1 if outcome["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
