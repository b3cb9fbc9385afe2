"""Grades a picture against a scene: the recognised things and texts are compared with the scene's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.evaluate.reading import LEGIBLE, Line, lines_of
from inkstream.evaluate.seeing import SeenThing, see, things_of
from inkstream.pocket.captions import STATES
from inkstream.pocket.scenes import PLACES, Scene, Thing, Writing, relation_holds

ALL = STATES["dense"]
SLACK = 0.03
"""Tolerance of places, as a share of the picture: a thing may be this far outside its cell."""

FOLDED = str.maketrans({"l": "I"})
"""Characters that look the same in a face. The grader treats them as equal."""


@dataclass(frozen=True)
class Marks:
    """Grades of a picture. None: the scene does not contain it, or the caption did not state it."""

    background: bool | None = None
    objects: float | None = None  # share of the scene's things that are present
    colours: float | None = None  # share of the scene's shapes that are present with the right colour
    object_and_colour: bool | None = None  # all things have the right name and colour, and there are no others
    places: float | None = None  # share of the scene's things that are present at the right place
    count: bool | None = None  # the number of things is exact; only for kind count
    relation: bool | None = None
    text_exact: bool | None = None  # all texts are exact, and there are no others
    characters: float | None = None  # 1 - min(edit distance, length) / length
    ned: float | None = None  # 1 - edit distance / the longer of the two lengths
    script: str | None = None  # script of the first text: latin or hanzi
    length: int | None = None  # length of the first text in characters
    asked: bool | None = None  # of an edit: the change is there
    kept: bool | None = None  # of an edit: all else is there, and nothing else


def grade(
    picture: Image.Image | NDArray[np.uint8], scene: Scene, stated: frozenset[str] = ALL, open_colour: bool = False
) -> Marks:
    """Grade a picture, an image or (H, W, 3) uint8, against a scene.

    stated: facts that the caption states in addition to things, relations and text: a value of captions.STATES.
    open_colour: the caption states no colours of things. Text that is too small to read (LEGIBLE) is not graded.
    """
    seen = see(picture)
    lines = lines_of(seen) if scene.writings else []
    read = {id(region) for line in lines for region in line.regions}
    things = things_of(seen, [r for r in seen.regions if id(r) not in read]) if scene.things else []
    if scene.writings:  # an unknown thing may be a wrong letter, which the text grades count
        things = [thing for thing in things if thing.name]
    background = seen.background == scene.background if "background" in stated else None
    exact, characters, ned = _text_marks(lines, _legible(scene, seen.side))
    first = scene.writings[0] if scene.writings else None
    script, length = (first.script, len(first.text)) if first else (None, None)
    if not scene.things:
        return Marks(background, text_exact=exact, characters=characters, ned=ned, script=script, length=length)

    pairs = _pair(scene.things, things)
    shapes = [(thing, other) for thing, other in pairs if thing.colour and not open_colour]
    wanted, found = (
        Counter((t.name, None if open_colour else t.colour) for t in some) for some in (scene.things, things)
    )
    placed = "place" in stated and scene.kind in ("things", "emoji", "text")
    return Marks(
        background=background,
        objects=_share(other is not None for _, other in pairs),
        colours=_share(other is not None and other.colour == thing.colour for thing, other in shapes),
        object_and_colour=wanted == found,
        places=_share(other is not None and _is_at(other, thing.place) for thing, other in pairs) if placed else None,
        count=_count_is_right(scene, things) if scene.kind == "count" else None,
        relation=_relation_is_right(scene, things) if scene.relation else None,
        text_exact=exact, characters=characters, ned=ned, script=script, length=length,
    )  # fmt: skip


# Things


def _pair(wanted: Sequence[Thing], seen: Sequence[SeenThing]) -> list[tuple[Thing, SeenThing | None]]:
    """Match each wanted thing with a seen thing of equal name, or None. Equal colour is preferred, then equal place."""
    choices = sorted(
        (thing.colour != other.colour, not _is_at(other, thing.place), i, j)
        for i, thing in enumerate(wanted)
        for j, other in enumerate(seen)
        if thing.name == other.name
    )
    found: dict[int, int] = {}
    for _, _, i, j in choices:
        if i not in found and j not in found.values():
            found[i] = j
    return [(thing, seen[found[i]] if i in found else None) for i, thing in enumerate(wanted)]


def _is_at(thing: SeenThing, place: str) -> bool:
    down, across = divmod(PLACES.index(place), 3)
    return all(k / 3 - SLACK <= at <= (k + 1) / 3 + SLACK for k, at in ((across, thing.x), (down, thing.y)))


def _relation_is_right(scene: Scene, things: Sequence[SeenThing]) -> bool:
    """Return whether both things are present and the relation holds for all candidates of the first and the second.

    Candidates have the thing's name. If both things have equal names, candidates also have the thing's colour.
    """
    first, second = scene.things
    alike = first.name == second.name
    firsts, seconds = (
        [(o.x, o.y) for o in things if o.name == thing.name and (not alike or o.colour == thing.colour)]
        for thing in (first, second)
    )
    holds = [relation_holds(scene.relation or "", a, b) for a in firsts for b in seconds]
    return bool(holds) and all(holds)


def _count_is_right(scene: Scene, things: Sequence[SeenThing]) -> bool:
    return sum(thing.name == scene.things[0].name for thing in things) == len(scene.things)


def _share(right: Iterable[bool]) -> float | None:
    """Return the share of true values, or None if there are no values."""
    values = list(right)
    return sum(values) / len(values) if values else None


# Text


def _legible(scene: Scene, side: int) -> list[Writing]:
    return [writing for writing in scene.writings if writing.em * side >= LEGIBLE[writing.script]]


def _text_marks(lines: Sequence[Line], writings: Sequence[Writing]) -> tuple[bool | None, float | None, float | None]:
    """Compare lines with the wanted texts, in any order. Returns (exact, character accuracy, NED)."""
    if not writings:
        return None, None, None
    wanted, found = [fold(w.text) for w in writings], [fold(line.text) for line in lines]
    choices = sorted((edit_distance(a, b), i, j) for i, a in enumerate(wanted) for j, b in enumerate(found))
    pairs: dict[int, int] = {}
    distance = 0
    for cost, i, j in choices:
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
            distance += cost
    distance += sum(len(text) for i, text in enumerate(wanted) if i not in pairs)
    distance += sum(len(text) for j, text in enumerate(found) if j not in pairs.values())
    length, longer = sum(map(len, wanted)), max(sum(map(len, wanted)), sum(map(len, found)))
    return distance == 0, 1 - min(distance, length) / length, 1 - min(distance, longer) / longer


def fold(text: str) -> str:
    """Normalise a text: l becomes I, and runs of spaces become one space."""
    return " ".join(text.translate(FOLDED).split())


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements of characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        above, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(above[j] + (x != y), above[j + 1] + 1, row[j] + 1))
    return row[-1]
