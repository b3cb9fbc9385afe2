"""Benchmark batching: eight mixed requests together and one by one, and a small request that arrives after a long one.

    python scripts/bench_batching.py --date 2026-11-21 [--repeats 5] [--rounds 2] [--record batching-cpu]

One engine in one process draws with Pocket on the CPU, both ways in turn. Before the timing, each picture drawn
together with others is compared with the same picture drawn alone. The small request arrives after every second step of
the long one. "One by one" uses a lock that admits one request at a time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from time import perf_counter, process_time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import numpy as np
import torch
from PIL import Image

from inkstream import Engine, Request
from inkstream.bench.records import write_record
from inkstream.types import Machine, Step

MIXED = [
    {"prompt": "a red circle", "width": 64, "height": 64, "steps": 4, "guidance": 1.0},
    {"prompt": "a blue square above a green triangle", "width": 128, "height": 128, "steps": 16, "guidance": 4.0},
    {"prompt": "three yellow stars on a black background", "width": 192, "height": 192, "steps": 16, "guidance": 4.0},
    {"prompt": "the word HELLO in white letters", "width": 96, "height": 96, "steps": 8, "guidance": 1.0},
    {"prompt": "a cat emoji to the left of a dog emoji", "width": 128, "height": 64, "steps": 8, "guidance": 4.0},
    {"prompt": "a purple ring", "width": 160, "height": 160, "steps": 12, "guidance": 4.0},
    {"prompt": "two orange hearts", "width": 64, "height": 64, "steps": 16, "guidance": 4.0, "solver": "dpmpp_2m"},
    {"prompt": "a green cross on a pink background", "width": 128, "height": 128, "steps": 8, "guidance": 1.0},
]
LONG = Request(prompt="three yellow stars on a black background", width=192, height=192, steps=16, guidance=4.0, seed=0)
SMALL = Request(prompt="a red circle", width=64, height=64, steps=4, guidance=1.0, seed=0)
LEAST = 40.0
"""Smallest PSNR in dB between a picture drawn together with others and the same picture drawn alone. Below it the
benchmark stops."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    engine = Engine(Machine("cpu"))
    list(engine.load(LONG.model))
    rows = [*time_eight(engine, options.repeats), *time_small(engine, options.rounds)]
    if options.record:
        command = shlex.join(["python", *sys.argv])
        print(write_record(options.record, options.date, command, {}, rows), file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="repeats of the eight requests, for each way")
    parser.add_argument("--rounds", type=int, default=2, help="repeats of the long request, for each moment and way")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    return parser.parse_args()


def time_eight(engine: Engine, repeats: int) -> list[dict[str, object]]:
    """Compare the pictures of both ways, then time both ways in turn."""
    requests = [Request(seed=i, **fields) for i, fields in enumerate(MIXED)]
    pairs = list(zip(one_by_one(engine, requests), at_once(engine, requests)))
    decibels = [apart(a, b) for a, b in pairs]
    if min(decibels) < LEAST:
        raise SystemExit(f"a picture drawn together with others differs too much: PSNR {min(decibels):.1f} dB")
    same = sum(a.tobytes() == b.tobytes() for a, b in pairs)
    note = f"{same} of {len(pairs)} pictures are equal to those drawn alone, the least PSNR is {min(decibels):.0f} dB"
    wall: dict[str, list[float]] = {"together": [], "one_by_one": []}
    busy: dict[str, list[float]] = {"together": [], "one_by_one": []}
    for _ in range(repeats):
        for way, draw in (("together", at_once), ("one_by_one", one_by_one)):
            used = process_time()
            wall[way].append(timed(lambda draw=draw: draw(engine, requests)))
            busy[way].append(process_time() - used)
    made = {
        way: float(forwards(engine, lambda draw=draw: draw(engine, requests)))
        for way, draw in (("together", at_once), ("one_by_one", one_by_one))
    }
    return [
        row("eight mixed requests, seconds", **{way: median(times) for way, times in wall.items()}, note=note),
        row(
            "CPU seconds of the eight", **{way: median(times) for way, times in busy.items()},
            note=f"medians of {repeats}, in turn",
        ),
        row("transformer forwards of the eight", **made),
    ]  # fmt: skip


def one_by_one(engine: Engine, requests: Sequence[Request]) -> list[Image.Image]:
    return [engine.generate(request).images[0] for request in requests]


def at_once(engine: Engine, requests: Sequence[Request]) -> list[Image.Image]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda request: engine.generate(request).images[0], requests))


def forwards(engine: Engine, draw: Callable[[], object]) -> int:
    """Count the transformer's forwards while `draw` runs."""
    made: list[int] = []
    hook = engine.model.family.transformer.register_forward_hook(lambda *_: made.append(1))  # type: ignore[attr-defined]
    try:
        draw()
    finally:
        hook.remove()
    return len(made)


def apart(one: Image.Image, other: Image.Image) -> float:
    """Return the PSNR of two pictures in dB; infinite if all pixels are equal."""
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def time_small(engine: Engine, rounds: int) -> list[dict[str, object]]:
    """Time a small request that arrives while a long one is drawn, both ways. The long one's time is measured too."""
    assert LONG.steps is not None
    alone: list[float] = []
    small: dict[str, list[float]] = {"together": [], "one_by_one": []}
    long: dict[str, list[float]] = {"together": [], "one_by_one": []}
    for _ in range(rounds):
        for step in range(1, LONG.steps, 2):
            alone.append(timed(lambda: engine.generate(SMALL)))
            for way, one_at_a_time in (("together", nullcontext()), ("one_by_one", threading.Lock())):
                seconds = behind(engine, step, one_at_a_time)
                small[way].append(seconds[0])
                long[way].append(seconds[1])
    note = f"{len(alone)} samples; alone it takes {median(alone):.3g} s"
    return [
        row("a small request during a long one, median seconds", **{w: median(s) for w, s in small.items()}, note=note),
        row("the same, 95th percentile", **{way: percentile_95(times) for way, times in small.items()}),
        row("the long request, median seconds", **{way: median(times) for way, times in long.items()}),
    ]


def percentile_95(times: Sequence[float]) -> float:
    return quantiles(times, n=20, method="inclusive")[-1]


def behind(engine: Engine, step: int, one_at_a_time: AbstractContextManager[object]) -> tuple[float, float]:
    """Return the seconds of the small and of the long request. The small one arrives after that step of the other."""
    arrives = threading.Event()

    def draw_long() -> None:
        with one_at_a_time:
            for event in engine.submit(LONG):
                if isinstance(event, Step) and event.step == step:
                    arrives.set()

    def draw_small() -> None:
        with one_at_a_time:
            engine.generate(SMALL)

    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(timed, draw_long)
        arrives.wait()
        return timed(draw_small), long.result()


def timed(draw: Callable[[], object]) -> float:
    began = perf_counter()
    draw()
    return perf_counter() - began


def row(what: str, together: float, one_by_one: float, note: str = "") -> dict[str, object]:
    """Return one measurement as a row and print it."""
    measured = {
        "what": what,
        "together": round(together, 4),
        "one_by_one": round(one_by_one, 4),
        "ratio": round(one_by_one / together, 3),
        "note": note,
    }
    print(measured, flush=True)
    return measured


if __name__ == "__main__":
    main()
