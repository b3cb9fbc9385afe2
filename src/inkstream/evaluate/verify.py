"""Verifies pictures: what was asked for is there, and nothing went wrong in making them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.engine.pictures.asked import Asked
from inkstream.engine.pictures.checks import Checks, check_picture, delta_e2000
from inkstream.evaluate.reading import lines_of
from inkstream.evaluate.seeing import SeenThing, see, things_of
from inkstream.pocket.colours import lab
from inkstream.pocket.scenes import relation_holds
from inkstream.pocket.vocabulary import plural
from inkstream.pocket.wishes import Wish, WishedThing, read_wish

FLAT = 0.75
"""Smallest share of pixels like their neighbours in a flat picture. Only its things are counted."""
LIKE = 6
"""Largest difference of neighbours in a flat area, in levels of 255."""
LAYOUT = 12
"""Side of a colour layout: a picture reduced to so many cells along each side."""
SAME = 2.0
"""Largest mean deltaE2000 of the colour layouts of two pictures that count as duplicates."""
STEEP = 8.0
"""Levels of 255 by which a step across a seam exceeds the steps beside it."""
ACROSS = 0.7
"""Smallest share of a line of pixels that a seam crosses."""


@dataclass(frozen=True)
class ThingCheck:
    """Whether a picture shows a number of things, or two things in a relation."""

    wanted: str
    found: str
    right: bool

    @property
    def line(self) -> str:
        return f"things: {self.found}" + ("" if self.right else f", not {self.wanted}")


@dataclass(frozen=True)
class Quality:
    """What can go wrong in a picture that nobody asked for.

    sharpness: variance of the Laplacian of the brightness; lower is softer, and flat pictures have few edges.
    dark, bright: shares of clipped pixels. seams: places of straight lines across the whole picture, such as x=512.
    """

    sharpness: float
    dark: float
    bright: float
    blank: bool  # all pixels have one colour
    seams: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """The verification of one picture. things: empty if none were asked for, or the picture is not flat."""

    checks: Checks
    things: tuple[ThingCheck, ...]
    quality: Quality
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.checks.passed and all(thing.right for thing in self.things) and not self.quality.blank

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for."""
        return not (self.checks.texts or self.checks.colours or self.things)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "texts": [asdict(text) for text in self.checks.texts],
            "colours": [asdict(colour) for colour in self.checks.colours],
            "things": [asdict(thing) for thing in self.things],
            "quality": asdict(self.quality),
            "notes": list(self.notes),
        }


def verify(picture: Image.Image, asked: Asked, prompt: str = "") -> Verified:
    """Verify a picture. prompt: what it was drawn from; its things are counted if the picture is flat.

    Raises InputError if texts are asked for and the extra `ocr` is not installed.
    """
    checks, things, notes = check_picture(picture, asked), tuple[ThingCheck, ...](), tuple[str, ...]()
    if prompt and (wish := read_wish(prompt)).things:
        if wish.unknown:
            notes = (f"things are not counted: the prompt has words that are not known, such as {wish.unknown[0]!r}",)
        elif not is_flat(picture):
            notes = ("things are not counted: the picture is not flat",)
        else:
            things = check_things(picture, prompt)
    return Verified(checks, things, quality_of(picture), notes)


# Things -------------------------------------------------------------------------------------------------------------


def is_flat(picture: Image.Image) -> bool:
    """Whether most of a picture is of even colour, so that its things can be recognised without a model."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.int16)
    across = np.abs(np.diff(pixels, axis=1)).max(-1)[:-1]
    down = np.abs(np.diff(pixels, axis=0)).max(-1)[:, :-1]
    return bool((np.maximum(across, down) <= LIKE).mean() >= FLAT)


def check_things(picture: Image.Image, prompt: str) -> tuple[ThingCheck, ...]:
    """Check the numbers, colours and relation of the things of a prompt, as Pocket's grammar reads it."""
    wish = read_wish(prompt)
    seen = see(picture)
    written = {id(region) for line in (lines_of(seen) if wish.texts else ()) for region in line.regions}
    things = [thing for thing in things_of(seen, [r for r in seen.regions if id(r) not in written]) if thing.name]
    counts = [_count(wanted, number, things) for wanted, number in _wanted(wish).items()]
    return (*counts, *([_relation(wish, things)] if wish.relation and len(wish.things) == 2 else []))


Kind = tuple[str, str | None]
"""A thing's name and colour; None: any colour."""


def _wanted(wish: Wish) -> dict[Kind, int]:
    """The number of things of each kind. Things of one name, of which one has any colour, are counted by name."""
    open_names = {thing.name for thing in wish.things if thing.colour is None}
    wanted: Counter[Kind] = Counter()
    for thing in wish.things:
        wanted[thing.name, None if thing.name in open_names else thing.colour] += thing.number
    return dict(wanted)


def _count(kind: Kind, number: int, things: Sequence[SeenThing]) -> ThingCheck:
    name, colour = kind
    found = sum(thing.name == name and colour in (None, thing.colour) for thing in things)
    return ThingCheck(_counted(kind, number), _counted(kind, found), found == number)


def _counted(kind: Kind, number: int) -> str:
    name, colour = kind
    return f"{number} {f'{colour} ' if colour else ''}{name if number == 1 else plural(name)}"


def _relation(wish: Wish, things: Sequence[SeenThing]) -> ThingCheck:
    first, second = wish.things
    relations = ("left of", "right of") if wish.relation == "beside" else (wish.relation or "",)
    pairs = [
        (a, b)
        for a, b in product(_like(first, things), _like(second, things))
        if a is not b and any(relation_holds(relation, (a.x, a.y), (b.x, b.y)) for relation in relations)
    ]
    wanted = f"{first.name} {wish.relation} {second.name}"
    return ThingCheck(wanted, wanted if pairs else "not so", bool(pairs))


def _like(wanted: WishedThing, things: Sequence[SeenThing]) -> list[SeenThing]:
    return [thing for thing in things if thing.name == wanted.name and wanted.colour in (None, thing.colour)]


# Quality ------------------------------------------------------------------------------------------------------------


def quality_of(picture: Image.Image) -> Quality:
    """Measure a picture's sharpness, clipping and seams."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    light = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    middle = light[1:-1, 1:-1]
    laplacian = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * middle
    dark, bright = (round(float(part.mean()), 4) for part in ((pixels <= 0).all(-1), (pixels >= 255).all(-1)))
    seams = [f"{axis}={place}" for axis, turned in (("x", light), ("y", light.T)) for place in _seams(turned)]
    return Quality(
        round(float(laplacian.var()), 1), dark, bright, bool(np.ptp(pixels, axis=(0, 1)).max() < 2), (*seams,)
    )


def _seams(light: NDArray[np.float32]) -> list[int]:
    """The columns left of which most rows have a step that is larger than the steps beside it, in one direction."""
    steps = np.diff(light, axis=1)  # (H, W - 1)
    beside = np.maximum(np.abs(steps[:, :-2]), np.abs(steps[:, 2:]))
    steep = np.abs(steps[:, 1:-1]) > beside + STEEP
    rising = (steep & (steps[:, 1:-1] > 0)).mean(0)
    falling = (steep & (steps[:, 1:-1] < 0)).mean(0)
    return [int(place) + 2 for place in np.flatnonzero(np.maximum(rising, falling) >= ACROSS)]


# Several pictures ---------------------------------------------------------------------------------------------------


def layout_of(picture: Image.Image) -> NDArray[np.float32]:
    """The colour layout of a picture: the mean colours of LAYOUT x LAYOUT cells in Lab. Returns (LAYOUT, LAYOUT, 3)."""
    return lab(np.asarray(picture.convert("RGB").resize((LAYOUT, LAYOUT), Image.Resampling.BOX)))


def compare_layouts(layouts: Mapping[str, NDArray[np.float32]]) -> tuple[list[tuple[str, str]], float | None]:
    """Return the pairs of duplicates, and the diversity: the mean deltaE2000 of the layouts over all pairs.

    The diversity is 0 if all pictures are equal, and None for fewer than two.
    """
    apart = {(a, b): float(delta_e2000(layouts[a], layouts[b]).mean()) for a, b in combinations(layouts, 2)}
    same = [pair for pair, distance in apart.items() if distance <= SAME]
    return same, round(sum(apart.values()) / len(apart), 2) if apart else None
