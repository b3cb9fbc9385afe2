"""Time eight mixed requests drawn at once beside one after another, and a small one that arrives behind a long one.

    python scripts/bench_batching.py --date 2026-11-21 [--repeats 5] [--record NAME]

One engine draws both ways in turn, in one process, with Pocket, on the CPU. Before anything is timed, every picture
drawn with others is compared with the one drawn alone. The long request's every second step is a moment at which a
small one arrives, once in either way: with batching, and behind a lock that lets in one request at a time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import numpy as np
import torch
from PIL import Image

import inkstream
from inkstream import Engine, Request
from inkstream.bench.records import RECORDS, read_record, write_record
from inkstream.bench.run import compare
from inkstream.types import Step

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
PAGE = Path("docs/batching.md")
TABLE = "## Measured\n\n"


def main() -> None:
    options = parse()
    if not options.render:
        torch.set_num_threads(options.threads)
        engine = Engine(device="cpu")
        list(engine.load(LONG.model))
        rows = [time_eight(engine, options.repeats), *time_small(engine, options.rounds)]
        command = shlex.join(["python", *sys.argv])
        print(write_record(options.record, options.date, command, {}, rows, options.folder), file=sys.stderr)
    if options.folder == RECORDS:
        PAGE.write_text(PAGE.read_text().partition(TABLE)[0] + TABLE + table(options.record))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", help="the day, for the record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="of the eight requests, either way")
    parser.add_argument("--rounds", type=int, default=3, help="of the long request, for each moment and either way")
    parser.add_argument("--record", default="batching-cpu", help="NAME of benchmarks/records/NAME.json")
    parser.add_argument("--folder", type=Path, default=RECORDS, help="another folder for the record")
    parser.add_argument("--render", action="store_true", help="run nothing, only render the page from the record")
    return parser.parse_args()


def time_eight(engine: Engine, repeats: int) -> dict[str, object]:
    """Both ways in turn, after their pictures were compared."""
    requests = [Request(seed=i, **fields) for i, fields in enumerate(MIXED)]
    alone, together = one_by_one(engine, requests), at_once(engine, requests)
    decibels = [apart(a, b) for a, b in zip(alone, together)]
    if min(decibels) < 40:
        raise SystemExit(f"a picture drawn with others is another one: {min(decibels):.1f} dB")
    result = compare(lambda: at_once(engine, requests), lambda: one_by_one(engine, requests), repeats, warmup=0)
    row = {
        "of": "eight mixed requests",
        "throughput_ratio": round(1 / result.ratio, 3),
        "together_median": round(result.ours.median, 3),
        "together_least": round(result.ours.least, 3),
        "together_most": round(result.ours.most, 3),
        "one_by_one_median": round(result.theirs.median, 3),
        "one_by_one_least": round(result.theirs.least, 3),
        "one_by_one_most": round(result.theirs.most, 3),
        "forwards_together": forwards(engine, lambda: at_once(engine, requests)),
        "forwards_one_by_one": forwards(engine, lambda: one_by_one(engine, requests)),
        "equal_pictures": sum(np.isinf(decibels).tolist()),
        "least_decibels": round(min(decibels), 1) if np.isfinite(min(decibels)) else None,
    }
    print(row, flush=True)
    return row


def one_by_one(engine: Engine, requests: Sequence[Request]) -> list[Image.Image]:
    return [engine.generate(request).images[0] for request in requests]


def at_once(engine: Engine, requests: Sequence[Request]) -> list[Image.Image]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda request: engine.generate(request).images[0], requests))


def forwards(engine: Engine, draw: Callable[[], object]) -> int:
    """How many forwards of the transformer something takes."""
    made: list[int] = []
    hook = engine.model.family.transformer.register_forward_hook(lambda *_: made.append(1))  # type: ignore[attr-defined]
    try:
        draw()
    finally:
        hook.remove()
    return len(made)


def apart(one: Image.Image, other: Image.Image) -> float:
    """Decibels between two pictures; infinite where every pixel is the same."""
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def time_small(engine: Engine, rounds: int) -> list[dict[str, object]]:
    """Seconds from the small request to its picture: alone, behind the long one with batching, and behind a lock."""
    seconds: dict[str, list[float]] = {"alone": [], "behind, together": [], "behind, one by one": []}
    long: dict[str, list[float]] = {name: [] for name in seconds}
    assert LONG.steps is not None
    for _ in range(rounds):
        for step in range(1, LONG.steps, 2):
            seconds["alone"].append(timed(lambda: engine.generate(SMALL)))
            for way, lock in (("behind, together", None), ("behind, one by one", threading.Lock())):
                small, whole = behind(engine, step, lock)
                seconds[way].append(small)
                long[way].append(whole)
    rows = []
    for way, times in seconds.items():
        row: dict[str, object] = {"of": "a small request", "way": way, "requests": len(times)}
        row |= {"median": round(median(times), 3), "p95": round(quantiles(times, n=20, method="inclusive")[-1], 3)}
        rows.append(row | ({"long_median": round(median(long[way]), 3)} if long[way] else {}))
        print(rows[-1], flush=True)
    return rows


def behind(engine: Engine, step: int, lock: threading.Lock | None) -> tuple[float, float]:
    """Seconds of a small request that arrives at that step of a long one, and of the long one. lock: held by the
    request that is drawn, where they are drawn one by one."""
    began, arrives = perf_counter(), threading.Event()

    def draw_long() -> float:
        if lock:
            lock.acquire()
        for event in engine.submit(LONG):
            if isinstance(event, Step) and event.step == step:
                arrives.set()
        if lock:
            lock.release()
        return perf_counter() - began

    def draw_small() -> None:
        if lock:
            lock.acquire()
        engine.generate(SMALL)

    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(draw_long)
        arrives.wait()
        small = timed(draw_small)
        return small, long.result()


def timed(draw: Callable[[], object]) -> float:
    began = perf_counter()
    draw()
    return perf_counter() - began


def table(name: str) -> str:
    """The page's tables, from the record."""
    record = read_record(name)
    return str(record)


if __name__ == "__main__":
    main()
