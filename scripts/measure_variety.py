"""Measure what seed variance does to Pocket's pictures: the diversity over seeds, and how well they follow the prompt.

    python scripts/measure_variety.py --date 2026-11-30 [--prompts 10] [--seeds 4] [--record pocket-variety-cpu]

The prompts state a shape, its colour and size and the background, and leave its place open. They are drawn as typed,
because Pocket's grammar would choose the place by the seed. A picture follows its prompt if it shows exactly that.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from PIL import Image

import inkstream
from inkstream import Request
from inkstream.bench.records import write_record
from inkstream.engine.pictures.inputs import to_image
from inkstream.evaluate.measures import diversity, features, psnr
from inkstream.evaluate.seeing import see, things_of
from inkstream.evaluate.variety import spread
from inkstream.pocket.scenes import Background
from inkstream.types import Variation

SHAPES = ("circle", "star", "square", "triangle", "heart", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black")
GROUNDS = ("white", "yellow", "blue", "green", "pink")
SIZES = ("small", "large", "medium")
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
VARIATIONS = (0.05, 0.1, 0.2, 0.4, 1.0)

Wanted = tuple[str, str, str, str]  # size, colour, shape, background


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = inkstream.load("pocket", inkstream.Machine("cpu"))
    wanted = list(islice(prompts(), options.prompts))
    rows: list[dict[str, Any]] = []
    plain: list[list[Image.Image]] = []
    for strength in STRENGTHS:
        drawn = [draw(model, one, options.seeds, seed_variance=strength) for one in wanted]
        plain = plain or drawn
        rows.append({"setting": "seed variance", "strength": strength, **judge(wanted, drawn)})
        print(rows[-1], flush=True)
    for strength in VARIATIONS:
        varied = str(Variation(900, strength))
        drawn = [draw(model, one, options.seeds, variation=varied) for one in wanted]
        near = [psnr(first[0], picture) for first, some in zip(plain, drawn) for picture in some]
        row = {"setting": "variation", "strength": strength, **judge(wanted, drawn)}
        rows.append(row | {"psnr_to_the_seed_s_picture": round(sum(near) / len(near), 2)})
        print(rows[-1], flush=True)
    if options.record:
        settings = {"prompts": options.prompts, "seeds": options.seeds}
        command = shlex.join(["python", *sys.argv])
        print(write_record(options.record, options.date, command, {}, [settings | row for row in rows]))


def prompts() -> Iterator[Wanted]:
    """Yield combinations of words, in which a shape and the ground have different colours."""
    for words in zip(cycle(SIZES), cycle(COLOURS), cycle(SHAPES), cycle(GROUNDS)):
        if words[1] != words[3]:
            yield words


def draw(model: inkstream.Model, wanted: Wanted, count: int, **fields: Any) -> list[Image.Image]:
    """Draw the pictures of one prompt as it is typed, with seeds from 11 on."""
    size, colour, shape, ground = wanted
    prompt = f"a {size} {colour} {shape} on a {ground} background"
    request = Request(prompt=prompt, seed=11, count=count, upsample=False, **fields)
    return [to_image(pixels) for pixels in model.decode(model.sample(request, model.encode(request)))]


def judge(wanted: Sequence[Wanted], drawn: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
    """Return the share of pictures that follow their prompt, and the diversity over seeds.

    place_spread: the share of pairs of a prompt's pictures in which the largest thing is in another cell of the 3 x 3
    grid. diversity: as in `evaluate.measures`.
    """
    follow, spreads = 0, []
    for (size, colour, shape, ground), pictures in zip(wanted, drawn):
        places = []
        for picture in pictures:
            seen = see(picture)
            things = things_of(seen)
            shown = [(thing.size, thing.colour, thing.name) for thing in things]
            follow += shown == [(size, colour, shape)] and seen.background == Background("flat", (ground,))
            places.append(things[0].place if things else "")
        spreads.append(spread(places))
    every = [picture for pictures in drawn for picture in pictures]
    groups = [number for number, pictures in enumerate(drawn) for _ in pictures]
    return {
        "follow": round(follow / len(every), 4),
        "place_spread": round(sum(spreads) / len(spreads), 4),
        "diversity": round(diversity(features(every), groups) or 0, 4),
    }


if __name__ == "__main__":
    main()
