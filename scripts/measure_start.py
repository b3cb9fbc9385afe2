"""Measure the stages of `inkstream generate` with Pocket, from the start of the process to its end.

    python scripts/measure_start.py --date 2026-11-21 [--repeats 5] [--record start-cpu]

One process runs the command as users do. Another runs the same stages one by one and times each. Both wall seconds and
CPU seconds are measured; load on the machine changes CPU seconds less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROMPT = "a red circle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--in-pieces", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_pieces:
        print(json.dumps(in_pieces()))
        return
    rounds = [one_round(options.threads) for _ in range(options.repeats)]
    rows = []
    for stage in rounds[0]:
        wall, cpu = (median(times[stage][i] for times in rounds) for i in (0, 1))
        rows.append({"stage": stage, "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "repeats": len(rounds)})
        print(rows[-1])
    if options.record:
        from inkstream.bench.records import write_record  # not at the top, because it imports torch

        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def one_round(threads: int) -> dict[str, tuple[float, float]]:
    """Measure once. Returns stage -> (wall seconds, CPU seconds)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    pieces = run([sys.executable, __file__, "--in-pieces"], environment)[0]
    with tempfile.TemporaryDirectory() as folder:
        command = ["generate", PROMPT, "--seed", "1", "-o", str(Path(folder) / "x.png")]
        _, wall, cpu = run([sys.executable, "-m", "inkstream", *command], environment)
    _, *python = run([sys.executable, "-c", "import torch, os; os._exit(0)"], environment)
    return {**json.loads(pieces), "inkstream generate, whole": (wall, cpu), "import torch, whole": tuple(python)}


def run(words: list[str], environment: dict[str, str]) -> tuple[str, float, float]:
    """Run a command. Returns its stdout, its wall seconds and its CPU seconds."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout.decode(), wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_pieces() -> dict[str, tuple[float, float]]:
    """Draw the same picture stage by stage and time each stage."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stages: dict[str, tuple[float, float]] = {}
    last = time.perf_counter(), time.process_time()

    def done(stage: str) -> None:
        nonlocal last
        now = time.perf_counter(), time.process_time()
        stages[stage], last = (now[0] - last[0], now[1] - last[1]), now

    import torch  # noqa: F401

    done("import torch")
    import inkstream.cli
    import inkstream.cli.generate
    import inkstream.engine.engine
    import inkstream.engine.pictures.metadata
    from inkstream.families import family_of

    family_of("zimage")
    done("import the rest")
    model = inkstream.load("pocket")
    done("load")
    from inkstream.engine.drawing.complete import complete
    from inkstream.engine.drawing.model import advance
    from inkstream.engine.pictures.inputs import to_image

    request = complete(inkstream.Request(prompt=PROMPT, seed=1), model.spec)
    cond = model.encode(request)
    run = model.start(request, cond, None)
    done("encode the prompt")
    while run.query is not None:
        advance(model.family, [run])
    done(f"{request.steps} steps")
    image = to_image(model.finish(run))
    done("decode")
    with tempfile.TemporaryDirectory() as folder:
        inkstream.engine.pictures.metadata.save_picture(image, Path(folder) / "x.png", request, model.spec)
    done("write")
    return stages


if __name__ == "__main__":
    main()
