"""A scene describes a picture as data. It is the ground truth for drawing, captions and grading."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from inkstream.pocket.atlas import load_atlas
from inkstream.types import InputError

Kind = Literal["things", "relation", "count", "emoji", "text"]
Size = Literal["small", "medium", "large"]

KINDS: tuple[Kind, ...] = get_args(Kind)
RELATIONS = ("left of", "right of", "above", "below")
PLACES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
SIDES: dict[Size, tuple[float, float]] = {"small": (0.16, 0.18), "medium": (0.24, 0.27), "large": (0.40, 0.46)}
"""Range of a thing's longer side, as a share of the picture's shorter side."""

MARGIN = 0.045  # empty border, as a share of the picture
GAP = 0.055  # smallest gap between two things, as a share of the picture
TRACKING = 0.04  # space between two glyphs in em
BASELINE = 0.82  # distance of the baseline from the top of a line in em
SPACE = 0.4  # width of a space in em


@dataclass(frozen=True)
class Background:
    """A flat background, a gradient, or a split. Two colours go from top to bottom, or left to right if `across`."""

    kind: Literal["flat", "gradient", "split"]
    colours: tuple[str, ...]
    across: bool = False


@dataclass(frozen=True)
class Thing:
    """A shape with a colour, or an emoji (colour None). x, y: centre as shares of width and height."""

    name: str
    colour: str | None
    size: Size
    x: float
    y: float
    side: float  # longer side, as a share of the picture's shorter side

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class Writing:
    """One line of text. x, y: centre as shares of width and height; em: font size as a share of the shorter side."""

    text: str
    face: str
    colour: str
    x: float
    y: float
    em: float

    @property
    def place(self) -> str:
        return ("top", "middle", "bottom")[min(int(self.y * 3), 2)]

    @property
    def script(self) -> Literal["latin", "hanzi"]:
        return script_of(self.text)


@dataclass(frozen=True)
class Scene:
    """The contents of a picture. relation: the position of the first thing relative to the second."""

    kind: Kind
    background: Background
    things: tuple[Thing, ...] = ()
    writings: tuple[Writing, ...] = ()
    relation: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Scene:
        """Return a scene from a table: the inverse of to_json. Raises InputError for missing or unknown keys."""
        try:
            ground = table["background"]
            return Scene(
                table["kind"],
                Background(ground["kind"], tuple(ground["colours"]), ground["across"]),
                tuple(Thing(**thing) for thing in table["things"]),
                tuple(Writing(**writing) for writing in table["writings"]),
                table["relation"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"not a scene ({error}): write it as Scene.to_json does") from error


def place_of(x: float, y: float) -> str:
    """Return the name of the 3 x 3 grid cell that holds a point."""
    return PLACES[min(int(y * 3), 2) * 3 + min(int(x * 3), 2)]


def script_of(text: str) -> Literal["latin", "hanzi"]:
    """Return "hanzi" if the text has a Chinese character, else "latin"."""
    return "hanzi" if any("\u4e00" <= char <= "\u9fff" for char in text) else "latin"


def relation_holds(relation: str, point: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether a relation holds between two points (x, y).

    The distance in the relation's direction must be more than a tenth of the picture and more than 0.9 times the larger
    of both distances.
    """
    dx, dy = other[0] - point[0], other[1] - point[1]
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return ahead > 0.1 and ahead > 0.9 * max(abs(dx), abs(dy))


def line_width(text: str, face: str) -> float:
    """Return the width of a line of text in em."""
    advances = load_atlas().advances[face]
    return sum(advances[c] if c != " " else SPACE for c in text) + TRACKING * (len(text) - 1)


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene contains a held-out pair of attributes or a held-out string.

    No run trains on such a scene. A scene of kind text is used as a test scene only if its string is held out.
    """
    return any(is_held_out_thing(thing) for thing in scene.things) or any(
        is_held_out_text(writing.text) for writing in scene.writings
    )


def is_held_out_thing(thing: Thing) -> bool:
    """Return whether a thing is held out: one in twenty pairs of shape and colour, or of emoji and place."""
    return _one_in_twenty(f"{thing.name}/{thing.colour or thing.place}")


def is_held_out_text(text: str) -> bool:
    """Return whether a string is held out: one in twenty, independent of case and spaces."""
    return _one_in_twenty("text/" + "".join(text.casefold().split()))


@lru_cache(maxsize=1 << 16)
def _one_in_twenty(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"inkstream/{key}".encode()).digest()[:8], "big") % 20 == 0
