"""A scene is what a picture shows, as data: the truth that is drawn, described and graded."""

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
"""Of a thing's longer side, as a share of the picture's shorter one."""

MARGIN = 0.045  # of the picture, free of things and text
GAP = 0.055  # between two things
TRACKING = 0.04  # em between two glyphs
BASELINE = 0.82  # em from the top of a line
SPACE = 0.4  # em


@dataclass(frozen=True)
class Background:
    """One colour, or two that fade or meet: from top to bottom, or `across` from left to right."""

    kind: Literal["flat", "gradient", "split"]
    colours: tuple[str, ...]
    across: bool = False


@dataclass(frozen=True)
class Thing:
    """A shape in a colour, or an emoji in its own. x, y: its centre as shares of width and height."""

    name: str
    colour: str | None
    size: Size
    x: float
    y: float
    side: float  # the longer one, as a share of the picture's shorter side

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class Writing:
    """One line of text. x, y: its centre as shares of width and height; em: as a share of the shorter side."""

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
    """What a picture shows. `kind` is what it is about; `relation` is that of the first thing to the second."""

    kind: Kind
    background: Background
    things: tuple[Thing, ...] = ()
    writings: tuple[Writing, ...] = ()
    relation: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Scene:
        """The inverse of to_json. InputError names what is missing or unknown."""
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
    """Where on a 3 x 3 grid a point lies."""
    return PLACES[min(int(y * 3), 2) * 3 + min(int(x * 3), 2)]


def script_of(text: str) -> Literal["latin", "hanzi"]:
    """hanzi if any character of the text is."""
    return "hanzi" if any("\u4e00" <= char <= "\u9fff" for char in text) else "latin"


def relation_holds(relation: str, point: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a point (x, y) stands so to another: by a tenth of the picture, and further that way than any other."""
    dx, dy = other[0] - point[0], other[1] - point[1]
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return ahead > 0.1 and ahead > 0.9 * max(abs(dx), abs(dy))


def line_width(text: str, face: str) -> float:
    """Of a line, in em."""
    advances = load_atlas().advances[face]
    return sum(advances[c] if c != " " else SPACE for c in text) + TRACKING * (len(text) - 1)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene holds a pair of attributes or a string that no run may train on.

    Of scenes of text the string decides whether they may be used to test; to train, nothing in them may be held out.
    """
    return any(is_held_out_thing(thing) for thing in scene.things) or any(
        is_held_out_text(writing.text) for writing in scene.writings
    )


def is_held_out_thing(thing: Thing) -> bool:
    """One in twenty pairs of shape and colour, and of emoji and place."""
    return _one_in_twenty(f"{thing.name}/{thing.colour or thing.place}")


def is_held_out_text(text: str) -> bool:
    """One in twenty strings, whatever their case and spacing."""
    return _one_in_twenty("text/" + "".join(text.casefold().split()))


@lru_cache(maxsize=1 << 16)
def _one_in_twenty(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"inkstream/{key}".encode()).digest()[:8], "big") % 20 == 0
