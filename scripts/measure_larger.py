"""Measure a large picture that Pocket draws in windows: seams at the windows' borders, and the peak of memory.

    python scripts/measure_larger.py --date 2026-11-30 [--pixels 2048] [--record larger-pocket-cpu] [--save FOLDER]

Pocket draws a scene, which is enlarged to the size by Lanczos resampling and drawn again in windows. This second pass
runs in a process of its own, whose peak is its growth after a first drawing.

Seams: the mean step between two rows of pixels on both sides of a window's border, divided by that at all other edges
of latent cells. Borders move from one evaluation to the next: each evaluation's are taken apart, and the largest ratio
counts. Without edges: pixels near an edge of the enlarged start picture do not count, because an edge of a drawn thing
may lie on a border.
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

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from inkstream import Engine, Machine, Request
from inkstream.bench.records import write_record
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.larger import evaluations_of
from inkstream.engine.drawing.model import windows_of
from inkstream.nn.heap import give_back_freed_memory
from inkstream.types import Result

PROMPT = "a large red circle in the center, on a blue background"
NEAR = 16
"""Pixels around an edge of the start picture that do not count as without edges."""
EDGE = 2.0
"""The step between two pixels of the start picture, in levels of 255, from which there is an edge."""
Floats = NDArray[np.float32]


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(measure(options)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(options.save or folder)
        place.mkdir(parents=True, exist_ok=True)
        small = Engine(Machine("cpu")).generate(Request(prompt=PROMPT, seed=options.seed))
        small.images[0].save(place / "small.png")
        sides = (options.pixels, options.pixels)
        small.images[0].resize(sides, Image.Resampling.LANCZOS).save(place / "enlarged.png")
        words = [sys.executable, __file__, "--child", "--date=", f"--save={place}"]
        words += [
            f"--{name}={getattr(options, name)}" for name in ("pixels", "strength", "steps", "guidance", "tile", "seed")
        ]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row, indent=2))
    if options.record:
        place_of_its_own = {"--save", options.save, f"--save={options.save}"}  # on this machine
        words = shlex.join(word for word in ("python", *sys.argv) if word not in place_of_its_own)
        print(write_record(options.record, options.date, words, {}, [row]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--pixels", type=int, default=2048, help="side of the large picture")
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=20, help="of the whole schedule; the strength leaves some out")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 needs half of the time")
    parser.add_argument("--tile", type=int, default=128, help="side of a window in pixels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", help="folder to keep the pictures in")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Draw the enlarged picture again in this process. Returns memory, time and seams."""
    torch.set_num_threads(1)
    folder, engine = Path(options.save), Engine(Machine("cpu"))
    engine.generate(Request(prompt=PROMPT, width=64, height=64, steps=1, seed=1))
    request = Request(
        prompt=PROMPT, seed=options.seed, image=str(folder / "enlarged.png"), width=options.pixels,
        height=options.pixels, strength=options.strength, steps=options.steps, tile=options.tile,
        guidance=options.guidance,
    )  # fmt: skip
    foreseen = next(plan for plan in engine.placing(request).plans(request) if plan.placement == "resident")
    gc.collect()
    give_back_freed_memory()  # memory that the first drawing freed would serve the measured one
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.perf_counter()
    drawn = Result.of(engine.submit(request)).images[0]
    seconds, measured = time.perf_counter() - began, peak() - before
    drawn.save(folder / "drawn.png")
    whole, spec = complete(request, engine.spec("pocket")), engine.spec("pocket")
    evaluations = evaluations_of(whole, spec)
    shape = engine.model.family.latent_shape(whole.width, whole.height)
    windows = windows_of(whole, shape)
    assert windows is not None, f"{options.pixels} pixels fit into one window of {options.tile}"
    pixels, start = (np.asarray(image, np.float32) for image in (drawn, whole.start))
    row: dict[str, Any] = {
        "pixels": options.pixels, "tile": options.tile, "windows": len(windows), "strength": options.strength,
        "evaluations": evaluations, "seconds": round(seconds, 1), "foreseen": foreseen.peak, "measured": measured,
        "foreseen_share": round(foreseen.peak / measured, 4), "phases": dict(foreseen.phases),
    }  # fmt: skip
    calm = away_from_edges(start)
    row["calm_share"] = round(float(calm.mean()), 4)
    row["change_levels"] = round(float(np.abs(pixels - start).mean()), 3)
    turns = [windows.moved(turn) for turn in range(evaluations)]
    cell = options.pixels // shape[1]
    for axis, name in enumerate(("rows", "columns")):
        corners = [turn.rows if axis == 0 else turn.columns for turn in turns]
        borders = [borders_of(firsts, turns[0].side[axis], shape[axis + 1]) for firsts in corners]
        for kind, image, mask in (
            ("drawn", pixels, calm), ("drawn_whole", pixels, np.ones_like(calm)), ("start", start, calm),
        ):  # fmt: skip
            steps = steps_at_cells(image, mask, axis, cell)
            row[f"{kind}_{name}"] = round(max(ratio(steps, own) for own in borders), 4)
    return row


def peak() -> int:
    """Return the peak of this process since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def borders_of(firsts: tuple[int, ...], side: int, length: int) -> set[int]:
    """The edges of windows inside the picture, as numbers of latent cells."""
    return {edge for first in firsts for edge in (first, first + side)} - {0, length}


def steps_at_cells(pixels: Floats, mask: NDArray[np.bool_], axis: int, cell: int) -> dict[int, float]:
    """Edge of latent cells -> the mean step over it, of the pixels that count. axis: 0 for rows."""
    pixels, mask = (array if axis == 0 else array.swapaxes(0, 1) for array in (pixels, mask))
    found: dict[int, float] = {}
    for number in range(1, len(pixels) // cell):
        at = number * cell
        step = np.abs(pixels[at] - pixels[at - 1]).mean(-1)[mask[at] & mask[at - 1]]
        if len(step):
            found[number] = float(step.mean())
    return found


def ratio(steps: dict[int, float], borders: set[int]) -> float:
    """The mean step at borders over that at all other edges of cells."""
    own, other = ([step for at, step in steps.items() if (at in borders) == wanted] for wanted in (True, False))
    return float(np.mean(own) / np.mean(other))


def away_from_edges(pixels: Floats) -> NDArray[np.bool_]:
    """(H, W, 3) -> where there is no edge within NEAR pixels."""
    edge = np.zeros(pixels.shape[:2], bool)
    for axis in (0, 1):
        steep = np.abs(np.diff(pixels, axis=axis)).max(-1) > EDGE
        edge[tuple(slice(0, size) for size in steep.shape)] |= steep
    for axis in (0, 1):
        grown = edge.copy()
        for by in range(1, NEAR + 1):
            near, far = slice(by, None), slice(None, -by)
            one = (near, slice(None)) if axis == 0 else (slice(None), near)
            two = (far, slice(None)) if axis == 0 else (slice(None), far)
            grown[one] |= edge[two]
            grown[two] |= edge[one]
        edge = grown
    return ~edge


if __name__ == "__main__":
    main()
