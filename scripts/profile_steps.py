"""Profile the steps of a picture with torch's profiler, for cases of `inkstream bench`.

    python scripts/profile_steps.py tiny medium real-width --date 2026-11-21 [--repeats 3] [--record profile-cpu]

Models have random weights. The time of an operation excludes the operations that it calls. The rest of the time,
between operations, is Python, torch and the profiler on a CPU, and idle time on a GPU. The seconds are measured without
the profiler.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from inkstream.bench.cases import CASES, Case
from inkstream.bench.ours import random_model
from inkstream.bench.records import write_record
from inkstream.engine.machine.loader import DTYPES
from inkstream.types import Request

PRODUCTS = ("mm", "linear", "gemm", "cutlass", "nvjet", "cublas")
ATTENTION = ("attention", "flash", "fmha")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.cases:
        rows.append({"case": name, **measure(CASES[name], options.repeats)})
        print(rows[-1])
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


@torch.inference_mode()
def measure(case: Case, repeats: int) -> Mapping[str, float]:
    """Return the seconds of the steps and the share of each kind of work."""
    device = torch.device(case.device)
    model = random_model(case.spec, device, DTYPES[case.dtype])
    wish = {name: getattr(case, name) for name in ("width", "height", "guidance", "count", "steps")}
    request = Request.model_validate({"prompt": "a red fox by the river at dawn", "seed": 0, **wish})
    noise = torch.randn(case.count, *model.family.latent_shape(case.width, case.height), device=device)
    cond = model.encode(request)

    def draw() -> float:
        began = time.perf_counter()
        model.sample(request, cond, noise)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(2):  # warm-up; a GPU records the forward as a CUDA graph
        draw()
    seconds = median(draw() for _ in range(repeats))
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as told:
        profiled = sum(draw() for _ in range(repeats))
    kinds: Counter[str] = Counter()
    for event in told.key_averages():
        kinds[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    shares = {kind: kinds[kind] / 1e6 / profiled for kind in ("products", "attention", "passes")}
    shares["between"] = max(0.0, 1 - sum(shares.values()))
    return {"seconds": round(seconds, 3), **{kind: round(share, 3) for kind, share in shares.items()}}


def kind_of(operation: str) -> str:
    """Classify an operation by the profiler's name for it: `products` of matrices, `attention`, or memory `passes`."""
    name = operation.lower()
    if any(word in name for word in ATTENTION):
        return "attention"
    return "products" if any(word in name for word in PRODUCTS) else "passes"


if __name__ == "__main__":
    main()
