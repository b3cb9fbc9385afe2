"""Grades edits of scenes: whether the asked change happened, and whether all else stayed. It uses no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.evaluate.grades import fold
from inkstream.evaluate.reading import Line, lines_of
from inkstream.evaluate.seeing import Seen, SeenThing, see, things_of
from inkstream.pocket.captions import CHINESE_PLACES
from inkstream.pocket.colours import nearest_colour
from inkstream.pocket.edits import EDIT_KINDS, Edit, EditKind, noun, sample_edit
from inkstream.pocket.grammar import Grammar
from inkstream.pocket.scenes import Thing, Writing
from inkstream.pocket.vocabulary import CHINESE_COLOURS, CHINESE_EMOJI, SHAPES

FIRST = 1 << 41
"""Number of the first held-out edit. Training and its previews have lower ones."""
NEAR = 0.08
"""Largest distance of a thing from its place, along each axis, as a share of the picture."""
GRAMMAR = Grammar(
    tidy=True, faces=("mono", "bold"), em=(0.1, 0.5), objects=(2, 3), emoji_among_things=0.1, flat=1.0, gradient=0.0,
    split=0.0, english=1.0, letters=(1, 4), capitals=1.0, beside_text=0.35, second_line=0.0,
)  # fmt: skip
"""Scenes of the suite: two or three things, or a text of up to four capitals or digits, on one colour."""


@dataclass(frozen=True)
class EditMarks:
    """Grades of an edited picture."""

    asked: bool  # the change is there
    kept: bool  # all else is there, and nothing else
    facts: float  # share of what should stay that stayed: the background, and each other thing and text


@dataclass(frozen=True)
class EditCase:
    """An edit of a held-out scene, and an instruction in words that no training instruction has."""

    edit: Edit
    instruction: str


def grade_edit(picture: Image.Image | NDArray[np.uint8], edit: Edit) -> EditMarks:
    """Grade a picture that was edited. Things must be at their places, with their colours; texts exact, in theirs."""
    before, after = edit.before, edit.after
    seen = see(picture)
    lines = lines_of(seen) if after.writings or before.writings else []
    read = {id(region) for line in lines for region in line.regions}
    things = [thing for thing in things_of(seen, [r for r in seen.regions if id(r) not in read]) if thing.name]
    anywhere = edit.what.get("place") == ""  # a new thing may be at any free place

    new = [thing for thing in after.things if thing not in before.things]
    gone = [thing for thing in before.things if thing not in after.things]
    asked = all(_has(things, thing, anywhere) for thing in new) and not any(_has(things, thing) for thing in gone)
    asked &= all(_reads(seen, lines, w) for w in after.writings if w not in before.writings)
    if before.background != after.background:
        asked &= seen.background == after.background
    facts = [seen.background == after.background] if before.background == after.background else []
    facts += [_has(things, thing) for thing in after.things if thing in before.things]
    facts += [_reads(seen, lines, writing) for writing in after.writings if writing in before.writings]
    more = len(things) > len(after.things) or len(lines) > len(after.writings)
    return EditMarks(asked, all(facts) and not more, sum(facts) / len(facts) if facts else 1.0)


def _has(things: Sequence[SeenThing], thing: Thing, anywhere: bool = False) -> bool:
    return any(
        (one.name, one.colour) == (thing.name, thing.colour)
        and (anywhere or max(abs(one.x - thing.x), abs(one.y - thing.y)) <= NEAR)
        for one in things
    )


def _reads(seen: Seen, lines: Sequence[Line], writing: Writing) -> bool:
    """Return whether a line has a writing's text and colour."""
    return any(fold(line.text) == fold(writing.text) and _colour(seen, line) == writing.colour for line in lines)


def _colour(seen: Seen, line: Line) -> str:
    """Return the colour of a line: of the half of its pixels that differ most from the background."""
    rows, columns = (np.concatenate([getattr(r, axis) for r in line.regions]) for axis in ("rows", "columns"))
    pixels = seen.pixels[rows, columns]
    away = np.linalg.norm(pixels - seen.ground[rows, columns], axis=-1)
    firm = pixels[away >= median(away.tolist())]
    return nearest_colour(np.median(firm, axis=0))


# The suite


def edit_cases(each: int) -> Iterator[EditCase]:
    """Yield `each` held-out edits of every kind. One instruction in three is Chinese."""
    for place, kind in enumerate(EDIT_KINDS):
        for number in range(each):
            edit = sample_edit(GRAMMAR, FIRST + 10_000 * place + number, "held_out", kind)
            rng = Random(f"words/{kind}/{number}")
            yield EditCase(edit, in_other_words(edit, "zh" if number % 3 == 2 else "en", rng))


ENGLISH: dict[EditKind, tuple[str, ...]] = {
    "recolour": (
        "the {target} should be {colour}", "please paint the {target} {colour}", "I'd like the {target} in {colour}",
    ),
    "move": ("shift the {target} to the {place}", "could you slide the {target} to the {place} please"),
    "remove": ("get rid of the {target}", "erase the {target}", "I don't want the {target}"),
    "replace": ("swap the {target} for {new}", "I want {new} instead of the {target}"),
    "rewrite": ('it should say "{text}"', 'make the sign read "{text}"'),
    "add": ("there should be {new} at the {place}", "draw {new} in the {place}", "I also want {new} at the {place}"),
}  # fmt: skip
CHINESE: dict[EditKind, tuple[str, ...]] = {
    "recolour": ("把{target}涂成{colour}", "{target}应该是{colour}"),
    "move": ("把{target}挪到{place}",),
    "remove": ("不要{target}", "请擦掉{target}"),
    "replace": ("用{new}替换{target}",),
    "rewrite": ("让它写着“{text}”",),
    "add": ("请在{place}画一个{new}",),
}
"""Instructions in words that differ from those of `pocket.edits`."""


def in_other_words(edit: Edit, language: str, rng: Random) -> str:
    """Return an instruction for an edit in words that no training instruction has."""
    what = dict(edit.what)
    if edit.kind == "add" and not what["place"]:
        what["place"] = edit.after.things[-1].place
    if language == "zh":
        names = {**SHAPES, **CHINESE_EMOJI, "background": "背景", "text": "文字"}
        target = CHINESE_COLOURS.get(what.get("target colour", ""), "") + names.get(what.get("target", ""), "")
        colour = CHINESE_COLOURS.get(what.get("colour", ""), "")
        size = {"small": "小的", "large": "大的"}.get(what.get("size", ""), "")
        new = size + colour + names.get(what.get("name", ""), "")
        place = CHINESE_PLACES.get(what.get("place", ""), "")
        return rng.choice(CHINESE[edit.kind]).format(
            target=target, colour=colour, new=new, place=place, text=what.get("text")
        )
    target = " ".join(word for word in (what.get("target colour"), what.get("target")) if word)
    new = noun(what) if "name" in what else ""
    return rng.choice(ENGLISH[edit.kind]).format(**{**what, "target": target, "new": new})
