"""Measure the memory and time of every plan on a model, beside what was foreseen.

    python scripts/plan_peaks.py --date 2026-11-21 --record plans-cpu MODEL [MODEL ...] [--pixels 512] [--steps 2]

MODEL: anything `load` takes, or random:NAME for random weights at a known model's full size. Each plan runs in a
process of its own: on a GPU its peak is what torch allocated, on the CPU how far the process grew beyond what a drawing
with Pocket had already made of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch

from inkstream.bench.random_model import write_random
from inkstream.bench.records import write_record
from inkstream.engine.engine import Engine
from inkstream.engine.placement import PLANS
from inkstream.families import SPECS
from inkstream.types import Done, Failed, InputError, Request, Step


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(measure(options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            model = name
            if name.startswith("random:"):
                model = str(write_random(SPECS[name.removeprefix("random:")], Path(folder) / name.partition(":")[2]))
            for dtype in options.dtype or [None]:
                for plan in options.plan or PLANS:
                    row = {"model": Path(name).name, "plan": plan, **run_child(model, plan, dtype, options)}
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--date", default="", help="the day, for the record")
    parser.add_argument("--record", help="name of the record to write")
    parser.add_argument("--pixels", type=int, default=512, help="side of the picture")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device")
    parser.add_argument("--dtype", action="append", help="bf16, fp32; more than once for several")
    parser.add_argument("--plan", action="append", choices=PLANS, help="all of them when left out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(model: str, plan: str, dtype: str | None, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, model, "--child", "--plan", plan]
    words += ["--pixels", str(options.pixels), "--steps", str(options.steps)]
    words += [f"--{name}={value}" for name, value in (("device", options.device), ("dtype", dtype)) if value]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"error": f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One drawing under one plan: seconds, and bytes foreseen and measured."""
    (model,), (plan,), dtype = options.models, options.plan, (options.dtype or [None])[0]
    pixels = {"width": options.pixels, "height": options.pixels, "steps": options.steps}
    draw(Engine(options.device), Request(prompt="a red circle", width=64, height=64, steps=1, seed=1))
    engine = Engine(options.device, dtype, plan=plan)
    request = Request.model_validate({"prompt": "a lighthouse in fog, " * 12, "model": model, "seed": 1, **pixels})
    foreseen = {each.name: each for each in engine.placing(request).plans(request)}[plan]
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    before = reset_peak(on_gpu)
    seconds = draw(engine, request)
    return {
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "pixels": options.pixels,
        "foreseen": foreseen.peak,
        "measured": peak(on_gpu) - before,
        "process": peak(on_gpu),
        "phases": dict(foreseen.phases),
        **seconds,
    }


def draw(engine: Engine, request: Request) -> dict[str, float]:
    """Seconds until the model is loaded, of the median evaluation, and of all."""
    began = time.perf_counter()
    for _ in engine.load(request.model, request):
        pass
    loaded = time.perf_counter() - began
    steps: list[float] = []
    for event in engine.submit(request):
        if isinstance(event, Step):
            steps.append(event.seconds)
        elif isinstance(event, Failed):
            raise InputError(event.error)
        elif isinstance(event, Done):
            event.image.load()
    whole = time.perf_counter() - began
    return {"load": loaded, "evaluation": sorted(steps)[len(steps) // 2], "seconds": whole}


def reset_peak(on_gpu: bool) -> int:
    """Forget the peak there was, and return the bytes taken now."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return peak(on_gpu)


def peak(on_gpu: bool) -> int:
    """The most bytes taken since the last reset: by torch on a GPU, else by the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
