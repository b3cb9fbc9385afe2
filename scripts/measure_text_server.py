"""Measure a text encoder's server on this machine: time and bytes of prompts, beside encoding here.

    python scripts/measure_text_server.py --date 2026-11-30 [--model pocket] [--prompts 20] [--record text-server-cpu]

The server is a process of its own (`inkstream serve --encode-only`). Each prompt is new to it. The states must be equal
bit for bit. The rows of published models are computed from their sizes: the bytes of a prompt's states in bfloat16, and
the bytes of the weights that this machine does not read.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from safetensors.torch import save

import inkstream
from inkstream.bench.records import write_record
from inkstream.engine.machine.memory import count_weights
from inkstream.families import SPECS
from inkstream.types import Conditioning

PUBLISHED = {
    "z-image-turbo": (100, 2560),
    "flux1-dev": (512, 4096),
    "flux2-klein-4b": (512, 7680),
    "flux2-dev": (512, 15360),
}
"""Model -> the tokens of a prompt (of Z-Image, of a long one) and the width of its states."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(options.model, options.prompts), *map(foresee, PUBLISHED)]
    for row in rows:
        print(row, flush=True)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def measure(name: str, count: int) -> dict[str, Any]:
    """Return the medians of both ways over new prompts, in turns."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    words = [sys.executable, "-m", "inkstream", "serve", "--encode-only", "-m", name, f"--port={port}", "--device=cpu"]
    process = subprocess.Popen(words)
    try:
        wait_for(port)
        address = f"http://127.0.0.1:{port}"
        here = inkstream.load(name, inkstream.Machine("cpu")).family
        away = inkstream.load(name, inkstream.Machine("cpu", text_encoder_server=address)).family
        near, far, sizes, tokens = [], [], [], []
        for number in range(-2, count):  # the first two warm up
            prompt = f"{number + 100} red circles on a blue background beside a large green star in the evening"
            with torch.no_grad():
                began = time.perf_counter()
                local = here.encode(prompt)
                between = time.perf_counter()
                remote = away.encode(prompt)
                ended = time.perf_counter()
            assert equal(local, remote), prompt
            if number >= 0:
                near.append(between - began)
                far.append(ended - between)
                sizes.append(len(save({"tokens": remote.tokens.contiguous(), "lengths": torch.tensor(remote.lengths)})))
                tokens.append(len(remote.tokens))
    finally:
        process.terminate()
        process.wait(30)
    weights = count_weights(SPECS[name])["text_encoder"] * local.tokens.element_size()
    return {
        "model": name, "how": "measured", "tokens": round(median(tokens)), "bytes": round(median(sizes)),
        "seconds_here": round(median(near), 5), "seconds_away": round(median(far), 5), "weights_bytes": weights,
    }  # fmt: skip


def foresee(name: str) -> dict[str, Any]:
    """Return the computed bytes of a published model in bfloat16."""
    tokens, width = PUBLISHED[name]
    weights = count_weights(SPECS[name])
    encoders = sum(count for part, count in weights.items() if part.startswith("text_encoder"))
    return {
        "model": name,
        "how": "computed",
        "tokens": tokens,
        "bytes": tokens * width * 2,
        "weights_bytes": 2 * encoders,
    }


def equal(a: Conditioning, b: Conditioning) -> bool:
    return a.lengths == b.lengths and torch.equal(a.tokens, b.tokens)


def wait_for(port: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
