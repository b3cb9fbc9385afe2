"""Run a bake-off of Pocket, two quantisations of it and a loopback "provider", kill it twice, and record the results.

    python scripts/bake_off.py FOLDER [--prompts 40] [--seeds 2] [--steps 4] [--record NAME]

The provider speaks Together's dialect on 127.0.0.1. It draws the true scene of each prompt of the suite `pocket`, which
is the best that the graders can see, and refuses every twentieth prompt. The same command resumes a stopped run.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from inkstream.clients.manifest import NAME, read_lines
from inkstream.evaluate.bakeoff.results import as_record, read_results
from inkstream.evaluate.bakeoff.run import PICTURES
from inkstream.evaluate.suites import open_suite, thin
from inkstream.pocket.draw import render

REMOTE = "together:flux-1-schnell@name=loopback"
REFUSED = 20
"""One of so many prompts is refused."""
KILLED_AT = (0.25, 0.6)
"""Shares of all pictures at which the run is killed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    provider = serve(options.prompts)
    environment = {**os.environ, "TOGETHER_API_KEY": "loopback", "OMP_NUM_THREADS": "1",
                   "TOGETHER_BASE_URL": f"http://127.0.0.1:{provider.server_port}"}  # fmt: skip
    models = [f"pocket{quant}@steps={options.steps}" for quant in ("", "@int8", "@q4_k")]
    command = [
        sys.executable, "-m", "inkstream", "bakeoff", "pocket", "--models", ",".join([*models, REMOTE]),
        "--seeds", str(options.seeds), "--limit", str(options.prompts), "--out", str(options.folder), "--device", "cpu",
    ]  # fmt: skip
    total, log = (len(models) + 1) * options.prompts * options.seeds, options.folder / "runs.jsonl"
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for share in (*KILLED_AT, None):
        before = drawn_in(options.folder)
        done = any(one["of"].endswith("to the end") for one in runs)
        if done or (share is not None and len(before) >= share * total):
            continue  # an earlier start of this script has done this
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.5)
            if share is not None and len(drawn_in(options.folder)) >= share * total:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        after = drawn_in(options.folder)
        again = sum(after.get(file) != at for file, at in before.items())
        ending = "killed" if share else "to the end"
        runs.append({"of": f"run {len(runs) + 1}, {ending}", "pictures": len(after), "drawn_again": again})
        print(json.dumps(runs[-1]), flush=True)
        with log.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    if options.record:
        words = shlex.join(["python", *sys.argv]).replace(str(options.folder), "FOLDER")
        print(as_record(read_results(options.folder), options.record, words, runs))


def drawn_in(folder: Path) -> dict[str, int]:
    """The pictures that are complete, and their modification times."""
    there = folder / PICTURES
    files = [line["file"] for line in read_lines(there / NAME) if "file" in line]
    return {file: (there / file).stat().st_mtime_ns for file in files}


def serve(prompts: int) -> ThreadingHTTPServer:
    """A provider on loopback, in Together's dialect."""
    cases = list(thin(open_suite("pocket"), prompts).values())
    known = {case.prompt: (number, case.scene) for number, case in enumerate(cases)}

    class Provider(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Log nothing."""

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number, scene = known[asked["prompt"]]
            if number % REFUSED == REFUSED - 1 or scene is None:
                self._answer(422, {"error": {"message": "NSFW content detected in the prompt"}})
                return
            buffer = io.BytesIO()
            render(scene, 256).save(buffer, "PNG")
            self._answer(200, {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]})

        def _answer(self, status: int, document: Any) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    main()
