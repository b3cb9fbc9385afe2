"""Measure how often Pocket draws two things in their own boxes: by regions, and by the same words in one prompt.

    python scripts/measure_regions.py --date 2026-11-30 [--prompts 20] [--steps 8] [--record NAME] [--picture FILE]

Half of the prompts divide the picture into left and right, half into top and bottom. A thing is in its box if a thing
of its shape and colour has its centre there. All prompts are drawn as typed, because Pocket's grammar chooses places.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from PIL import Image

import inkstream
from inkstream import Request
from inkstream.bench.records import write_record
from inkstream.engine.pictures.inputs import to_image
from inkstream.evaluate.seeing import see, things_of

SHAPES = ("circle", "star", "square", "triangle", "heart", "ring")
COLOURS = ("red", "blue", "green", "orange", "purple", "black", "yellow")
SIDES = {
    ("on the left", "on the right"): ("0,0,0.5x1", "0.5,0,0.5x1"),
    ("at the top", "at the bottom"): ("0,0,1x0.5", "0,0.5,1x0.5"),
}
Thing = tuple[str, str]  # colour, shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--picture", type=Path, help="write the first pictures of each setting, side by side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = inkstream.load("pocket", inkstream.Machine("cpu"))
    pairs = [two_things(number) for number in range(options.prompts)]
    rows: list[dict[str, Any]] = []
    drawn: list[list[Image.Image]] = []
    for name in ("regions", "one prompt"):
        fields = {"steps": options.steps}
        drawn.append([draw(model, fields | fields_of(name, pair, i), i) for i, pair in enumerate(pairs)])
        rows.append({"setting": name, "prompts": len(pairs), "steps": options.steps, **judge(pairs, drawn[-1])})
        print(rows[-1], flush=True)
    if options.picture:
        save_rows(options.picture, drawn)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def two_things(number: int) -> tuple[Thing, Thing]:
    """Two things of different shapes and colours."""
    first = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
    second = COLOURS[(number * 2 + 1) % len(COLOURS)], SHAPES[(number + 1 + number // len(SHAPES)) % len(SHAPES)]
    if second[0] == first[0]:
        second = COLOURS[(number * 2 + 2) % len(COLOURS)], second[1]
    return first, second


def fields_of(setting: str, pair: tuple[Thing, Thing], number: int) -> dict[str, Any]:
    """The fields of a request for two things, in one of the settings."""
    first, second = (f"a {colour} {shape}" for colour, shape in pair)
    places, boxes = list(SIDES.items())[number % 2]
    if setting == "regions":
        regions = [f"{box}:{text}" for box, text in zip(boxes, (first, second))]
        return {"prompt": "two things on a white background", "regions": regions}
    return {"prompt": f"{first} {places[0]} and {second} {places[1]} on a white background"}


def draw(model: inkstream.Model, fields: dict[str, Any], seed: int) -> Image.Image:
    request = Request(seed=seed, upsample=False, **fields)
    (pixels,) = model.decode(model.sample(request, model.encode(request)))
    return to_image(pixels)


def judge(pairs: Sequence[tuple[Thing, Thing]], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Return shares of pictures. in_boxes: with both things in their boxes. drawn: with both things anywhere.

    colours: with both colours in their boxes, of things of any shape. exact: with both in their boxes and nothing else.
    """
    counts = dict.fromkeys(("in_boxes", "exact", "colours_in_boxes", "drawn"), 0)
    for number, (pair, picture) in enumerate(zip(pairs, pictures)):
        things = things_of(see(picture))
        halves = [
            [thing for thing in things if ((thing.y if number % 2 else thing.x) >= 0.5) == half] for half in (0, 1)
        ]
        there = [
            (colour, shape) in [(one.colour, one.name) for one in half] for (colour, shape), half in zip(pair, halves)
        ]
        counts["in_boxes"] += all(there)
        counts["exact"] += all(there) and len(things) == 2
        counts["colours_in_boxes"] += all(
            colour in [one.colour for one in half] for (colour, _), half in zip(pair, halves)
        )
        counts["drawn"] += all(thing in [(one.colour, one.name) for one in things] for thing in pair)
    return {name: round(count / len(pictures), 4) for name, count in counts.items()}


def save_rows(path: Path, drawn: Sequence[Sequence[Image.Image]], most: int = 8) -> None:
    """Write a row of pictures for each setting."""
    side, gap = drawn[0][0].width, 4
    count = min(most, len(drawn[0]))
    sheet = Image.new("RGB", (count * (side + gap) - gap, len(drawn) * (side + gap) - gap), "#808080")
    for row, pictures in enumerate(drawn):
        for column, picture in enumerate(pictures[:count]):
            sheet.paste(picture, (column * (side + gap), row * (side + gap)))
    sheet.save(path)


if __name__ == "__main__":
    main()
