"""Measure the memory and the time of a model under every plan, and compare the memory with the prediction.

    python scripts/plan_peaks.py --date 2026-11-21 --record plans-cpu MODEL [MODEL ...] [--pixels 512] [--steps 2]

MODEL: anything that `load` takes, or random:NAME for random weights with a known model's full size. Each plan runs in a
separate process. On a GPU the peak is the memory that torch allocated. On the CPU it is the growth of the process after
a first drawing with Pocket.
"""

from __future__ import annotations

import argparse
import gc
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
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.families import SPECS
from inkstream.nn.heap import give_back_freed_memory
from inkstream.types import Done, Failed, InputError, Machine, Request, Step


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
                for plan in options.placement or PLACEMENTS:
                    row = {"model": Path(name).name, "plan": plan, **run_child(model, plan, dtype, options)}
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--record", help="name of the record to write")
    parser.add_argument("--pixels", type=int, default=512, help="side of the picture")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device")
    parser.add_argument("--dtype", action="append", help="bf16 or fp32; repeat the option for both")
    parser.add_argument("--placement", action="append", choices=PLACEMENTS, help="a placement; default: all")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(model: str, plan: str, dtype: str | None, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, model, "--child", "--placement", plan]
    words += ["--pixels", str(options.pixels), "--steps", str(options.steps)]
    words += [f"--{name}={value}" for name, value in (("device", options.device), ("dtype", dtype)) if value]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"error": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Draw once under one placement. Returns seconds, predicted bytes and measured bytes."""
    (model,), (plan,), dtype = options.models, options.placement, (options.dtype or [None])[0]
    pixels = {"width": options.pixels, "height": options.pixels, "steps": options.steps}
    draw(Engine(Machine(options.device)), Request(prompt="a red circle", width=64, height=64, steps=1, seed=1))
    engine = Engine(Machine(options.device, dtype, placement=plan))
    request = Request.model_validate({"prompt": "a lighthouse in fog, " * 12, "model": model, "seed": 1, **pixels})
    foreseen = {each.placement: each for each in engine.placing(request).plans(request)}[plan]
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    gc.collect()
    give_back_freed_memory()  # memory that the first drawing freed would serve the measured one
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
    """Draw and return the seconds of loading, of the median evaluation, and in total."""
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
    """Reset the peak and return the bytes in use before the drawing: 0 on a GPU."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return peak(on_gpu)


def peak(on_gpu: bool) -> int:
    """Return the peak memory in bytes since the last reset: torch's on a GPU, otherwise the process's."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
