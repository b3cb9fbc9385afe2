"""Measure inpainting and outpainting with Pocket: is the asked thing in the hole, and does the background go on.

    python scripts/measure_edits.py --date 2026-11-30 [--pictures 40] [--record pocket-inpaint-cpu]

Start pictures are rendered scenes. Picture i has seed i, and none is chosen.

inpaint: a scene of two things. The box of one is masked, and another thing is asked for there. Right: the grader sees
a thing with the asked name and colour in the hole.

crop: the same at 256 x 256 pixels, and only the hole's surroundings are drawn, at 128 x 128. The prompt describes what
these show: the background is flat, and the other thing is outside.

outpaint: a scene is extended to the right or below by half its side. Right: the new space is the background (98% of its
pixels are within the grader's distance), and no seam shows: over it, and anywhere in the new space, the mean step
between two rows is at most 2 of 255 levels more than the background's own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import inkstream
from inkstream import Request
from inkstream.bench.records import write_record
from inkstream.engine.drawing.complete import complete
from inkstream.evaluate.seeing import FAR, see, things_of
from inkstream.pocket.captions import caption
from inkstream.pocket.colours import lab
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.scenes import Background, Scene, Thing

COMMAND = "python scripts/measure_edits.py --date {} --pictures {} --record {}"
SIDE = 128
MARGIN = 6
"""Pixels of 128 between a thing and the edge of its hole."""
FIRST = 7_000_000
"""First scene number. Runs train on others."""
GRAMMAR = Grammar(tidy=True, objects=(2, 2), emoji_among_things=0.0, flat=0.8, gradient=0.1, split=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--pictures", type=int, default=40, help="of each kind")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--sheet", help="save pictures that failed to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    rows, failed = [], []
    for kind, measure in {"inpaint": inpaint, "crop": crop, "outpaint": outpaint}.items():
        found = []
        for number in range(options.pictures):
            facts, before, after = measure(engine, number)
            found.append(facts)
            failed += [] if facts["right"] else [before, after]
            print(kind, number, facts, file=sys.stderr, flush=True)
        rows.append(
            {"kind": kind, "pictures": len(found)} | {name: round(mean(f[name] for f in found), 4) for name in found[0]}
        )
        print(rows[-1])
    if options.sheet and failed:
        sheet = Image.new("RGB", (6 * 260, -(-len(failed) // 6) * 260), "grey")
        for i, picture in enumerate(failed):
            sheet.paste(picture, (i % 6 * 260, i // 6 * 260))
        sheet.save(options.sheet)
    if options.record:
        print(
            write_record(
                options.record, options.date, COMMAND.format(options.date, options.pictures, options.record), {}, rows
            )
        )


def replaced(number: int) -> tuple[Scene, Scene, Thing]:
    """Scene `number`, the scene in which another thing takes the place of its second, and that thing."""
    scene = next(scenes(number))
    kept, gone = scene.things
    rng = Random(number)
    for other in scenes(FIRST // 2 + number):
        asked = rng.choice(other.things)
        colours = {thing.colour for thing in scene.things} | set(scene.background.colours)
        if asked.colour not in colours and asked.name != gone.name and asked.colour is not None:
            new = replace(gone, name=asked.name, colour=asked.colour)
            return scene, replace(scene, things=(kept, new)), new
    raise AssertionError


def scenes(number: int) -> Iterator[Scene]:
    while True:
        yield sample(GRAMMAR, FIRST + number, "any", "things")
        number += 1000


def hole_of(thing: Thing, side: int) -> tuple[int, int, int, int]:
    """The box of a thing with a margin, in a square picture of so many pixels."""
    half = thing.side * side / 2 + MARGIN * side / SIDE
    left, top, right, bottom = (round(at * side + sign * half) for sign in (-1, 1) for at in (thing.x, thing.y))
    return max(left, 0), max(top, 0), min(right, side), min(bottom, side)


def masked(scene: Scene, thing: Thing, side: int) -> tuple[Image.Image, Image.Image]:
    """A scene's picture, and the mask of a thing's box."""
    mask = Image.new("L", (side, side))
    mask.paste(255, hole_of(thing, side))
    return render(scene, side), mask


def is_there(picture: Image.Image, thing: Thing) -> bool:
    """Whether a thing with this name and colour is seen at its place."""
    return any(
        (seen.name, seen.colour) == (thing.name, thing.colour)
        and max(abs(seen.x - thing.x), abs(seen.y - thing.y)) < thing.side / 2
        for seen in things_of(see(picture))
    )


def same_outside(before: Image.Image, after: Image.Image, mask: Image.Image) -> bool:
    outside = np.asarray(mask) == 0
    return bool(np.array_equal(np.asarray(before)[outside], np.asarray(after)[outside]))


def inpaint(engine: inkstream.Engine, number: int) -> tuple[dict[str, Any], Image.Image, Image.Image]:
    scene, wanted, thing = replaced(number)
    before, mask = masked(scene, thing, SIDE)
    request = Request(prompt=caption(wanted), image=before, mask=mask, seed=number)
    after = engine.generate(request).images[0]
    return {"right": is_there(after, thing), "outside_equal": same_outside(before, after, mask)}, before, after


def crop(engine: inkstream.Engine, number: int) -> tuple[dict[str, Any], Image.Image, Image.Image]:
    for index in range(number, 10**6, 1000):
        scene, wanted, thing = replaced(index)
        scene, wanted = (replace(s, background=Background("flat", s.background.colours[:1])) for s in (scene, wanted))
        before, mask = masked(scene, thing, 2 * SIDE)
        fields = {"image": before, "mask": mask, "crop": "1.7", "seed": number}
        left, top, right, bottom = complete(Request(**fields), engine.spec("pocket")).edit.window
        kept = hole_of(scene.things[0], 2 * SIDE)
        if kept[2] <= left or kept[0] >= right or kept[3] <= top or kept[1] >= bottom:
            break
    across, down = right - left, bottom - top
    near = replace(thing, size="large", x=(thing.x * 2 * SIDE - left) / across, y=(thing.y * 2 * SIDE - top) / down)
    after = engine.generate(Request(prompt=caption(replace(wanted, things=(near,))), **fields)).images[0]
    return {"right": is_there(after, thing), "outside_equal": same_outside(before, after, mask)}, before, after


def outpaint(engine: inkstream.Engine, number: int) -> tuple[dict[str, Any], Image.Image, Image.Image]:
    scene, below = next(scenes(number)), number % 2 == 1
    scene = replace(scene, background=replace(scene.background, across=below))  # colours go on in the new space
    width, height = (SIDE, SIDE * 3 // 2) if below else (SIDE * 3 // 2, SIDE)
    things = tuple(replace(t, x=t.x * SIDE / width, y=t.y * SIDE / height) for t in scene.things)
    before = render(scene, SIDE)
    request = Request(
        prompt=caption(replace(scene, things=things)),
        image=before,
        extend=f"{'bottom' if below else 'right'}={SIDE // 2}",
        seed=number,
    )
    after = engine.generate(request).images[0]
    ground = np.asarray(render(replace(scene, things=()), width, height), np.float32)
    pixels = np.asarray(after, np.float32)
    if below:
        ground, pixels = ground.swapaxes(0, 1), pixels.swapaxes(0, 1)
    share = float((np.linalg.norm(lab(pixels) - lab(ground), axis=-1)[:, SIDE:] <= FAR).mean())
    ours, own = steps(pixels), steps(ground)
    seam, steepest = float(ours[SIDE - 1] - own[SIDE - 1]), float((ours - own)[SIDE - 1 :].max())
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, (0, 0, SIDE, SIDE))
    whole = Image.new("RGB", (width, height))
    whole.paste(before)
    facts = {
        "right": share >= 0.98 and max(seam, steepest) <= 2,
        "background_share": share,
        "seam_levels": seam,
        "steepest_levels": steepest,
        "outside_equal": same_outside(whole, after, mask),
    }
    return facts, before, after


def steps(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean step between each column and the next, in levels of 255."""
    return np.abs(np.diff(pixels, axis=1)).mean((0, 2))


if __name__ == "__main__":
    main()
