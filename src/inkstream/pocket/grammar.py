"""A Grammar is a distribution of scenes, which a recipe sets. `sample` draws a scene from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from random import Random
from typing import Any, Literal, TypeVar

import numpy as np

from inkstream.pocket.colours import COLOURS, lab
from inkstream.pocket.scenes import (
    GAP,
    KINDS,
    MARGIN,
    RELATIONS,
    SIDES,
    TRACKING,
    Background,
    Kind,
    Scene,
    Size,
    Thing,
    Writing,
    is_held_out,
    is_held_out_text,
    line_width,
    relation_holds,
    script_of,
)
from inkstream.pocket.vocabulary import CHINESE, EMOJI, ENGLISH, FACES, HANZI, HANZI_FACES, HIDING, SHAPES
from inkstream.types import InputError

Split = Literal["train", "held_out", "any"]
T = TypeVar("T", Thing, Writing)
_SHAPES = tuple(SHAPES)


@dataclass(frozen=True)
class Grammar:
    """The distribution of scenes. A recipe's [data.grammar] table changes the defaults."""

    # Shares of the kinds. Their sum need not be 1.
    things: float = 0.35
    relation: float = 0.12
    count: float = 0.08
    emoji: float = 0.15
    text: float = 0.30

    objects: tuple[int, int] = (1, 4)  # number of things in a scene of kind things; kind emoji has at most 2
    counts: tuple[int, int] = (2, 5)  # number of things in a scene of kind count
    shapes: int = len(SHAPES)  # the first N shapes are used
    emojis: int = len(EMOJI)  # the first N emoji are used
    emoji_among_things: float = 0.15  # share of emoji among the things of other kinds of scene
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[Size, ...] = ("small", "medium", "large")

    flat: float = 0.6
    gradient: float = 0.2
    split: float = 0.2
    white: float = 0.3  # share of white among flat backgrounds; the other colours share the rest
    grounds: tuple[str, ...] = tuple(COLOURS)

    english: float = 0.6  # share of English text
    letters: tuple[int, int] = (1, 10)
    spelt: float = 0.35  # share of random letters or digits in English text, so the model does not memorise words
    capitals: float = 0.7  # share of words in all capitals; others are capitalised or lower case
    hanzi: int = 200  # the first N characters are used
    characters: tuple[int, int] = (1, 4)
    shuffled: float = 0.4  # share of random characters, uniformly drawn, in Chinese text
    faces: tuple[str, ...] = tuple(FACES)
    em: tuple[float, float] = (0.1, 0.5)
    beside_text: float = 0.4  # share of texts with things beside them
    second_line: float = 0.1  # share of texts with a second line in another colour or script

    tidy: bool = False  # positions, sides and ems are on a grid of sixteenths: a dense caption then describes all

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> Grammar:
        """Return a Grammar from a recipe's table. Raises InputError for an unknown field or a wrong value."""
        known = {field.name: field.default for field in fields(Grammar)}
        words = {"colours": COLOURS, "grounds": COLOURS, "faces": FACES, "sizes": SIDES}
        values = {}
        for name, value in table.items():
            if name not in known:
                raise InputError(f"[grammar] has no field {name!r}: it takes {', '.join(known)}")
            default = known[name]
            if not (_like(value, default) if not isinstance(default, tuple) else _list_like(value, default)):
                raise InputError(f"[grammar] {name} = {value!r}: it takes a value like {default!r}")
            for word in value if name in words else ():
                if word not in words[name]:
                    raise InputError(f"[grammar] {name} has no {word!r}: it takes {', '.join(words[name])}")
            values[name] = tuple(value) if isinstance(default, tuple) else value
        return Grammar(**values)


def _like(value: Any, default: Any) -> bool:
    """Return whether a value has the type of the default. An integer is accepted for a float."""
    if isinstance(default, str | bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else int) and not isinstance(value, bool)


def _list_like(value: Any, default: tuple[Any, ...]) -> bool:
    if not isinstance(value, list | tuple) or not value or not all(_like(item, default[0]) for item in value):
        return False
    return isinstance(default[0], str) or (len(value) == 2 and value[0] <= value[1])


def sample(grammar: Grammar, seed: int, split: Split = "train", kind: Kind | None = None) -> Scene:
    """Return scene number `seed` of a grammar. Equal numbers give equal scenes.

    Split `train` gives only scenes without held-out things or texts; `held_out` gives only scenes with them. Raises
    InputError if the grammar has no such scene.
    """
    rng = Random(seed)
    if kind is None:
        kind = rng.choices(KINDS, [getattr(grammar, name) for name in KINDS])[0]
    for _ in range(5000):
        scene = _BUILDERS[kind](rng, grammar)
        if scene is not None and _belongs(scene, split):
            return scene
    raise InputError(f"the grammar has no {split} scene of kind {kind!r}: widen its shapes, colours, letters or em")


def _belongs(scene: Scene, split: Split) -> bool:
    if split == "train":
        return not is_held_out(scene)
    if split == "held_out" and scene.kind == "text":
        return is_held_out_text(scene.writings[0].text)
    return split == "any" or is_held_out(scene)


# Builders. Each returns a scene of its kind, or None if the drawn items do not fit.


def _things(rng: Random, grammar: Grammar) -> Scene | None:
    ground = _background(rng, grammar)
    count = rng.randint(*grammar.objects)
    things = _lay_out(rng, grammar, ground, _cells(rng, count), [_size(rng, grammar, count) for _ in range(count)])
    return Scene("things", ground, things) if things else None


def _emoji(rng: Random, grammar: Grammar) -> Scene | None:
    ground = _background(rng, grammar)
    count = rng.randint(1, min(2, grammar.objects[1]))
    sizes: list[Size] = [_size(rng, grammar, count) for _ in range(count)]
    things = _lay_out(rng, grammar, ground, _cells(rng, count), sizes, emoji=1.0)
    return Scene("emoji", ground, things) if things else None


def _relation(rng: Random, grammar: Grammar) -> Scene | None:
    ground = _background(rng, grammar)
    relation = rng.choice(RELATIONS)
    along = rng.choice([(0, 1), (1, 2), (0, 2), (0, 2)])
    aside = rng.randrange(3), rng.randrange(3)
    if abs(aside[0] - aside[1]) >= along[1] - along[0]:
        aside = aside[0], aside[0]
    if grammar.tidy:
        along, aside = (0, 2), (1, 1)
    if relation in ("right of", "below"):
        along = along[::-1]
    sideways = relation in ("left of", "right of")
    cells = [3 * b + a if sideways else 3 * a + b for a, b in zip(along, aside)]
    things = _lay_out(rng, grammar, ground, cells, [_size(rng, grammar, 2) for _ in range(2)])
    if not things or not relation_holds(relation, (things[0].x, things[0].y), (things[1].x, things[1].y)):
        return None
    return Scene("relation", ground, things, relation=relation)


def _count(rng: Random, grammar: Grammar) -> Scene | None:
    ground = _background(rng, grammar)
    count = rng.randint(*grammar.counts)
    sizes: list[Size] = [_size(rng, grammar, max(count, 3))] * count
    cells = DICE[count] if grammar.tidy and count in DICE else _cells(rng, count)
    things = _lay_out(rng, grammar, ground, cells, sizes, alike=True)
    return Scene("count", ground, things) if things else None


def _text(rng: Random, grammar: Grammar) -> Scene | None:
    ground = _background(rng, grammar)
    beside = rng.random() < grammar.beside_text
    second = not beside and rng.random() < grammar.second_line
    rows = rng.sample([0, 1, 2], 2) if second else [rng.choice([0, 2, 1] if beside else [0, 1, 2])]
    largest = 0.26 if beside or second else grammar.em[1]
    writings: list[Writing] = []
    for row in rows:
        writing = _writing(rng, grammar, ground, row, largest, [w.colour for w in writings])
        if writing is None:
            return None
        writings.append(writing)
    things: tuple[Thing, ...] = ()
    if beside:
        free = [cell for cell in range(9) if cell // 3 != rows[0]]
        count = rng.choice([1, 1, 2])
        sizes: list[Size] = [_size(rng, grammar, 3) for _ in range(count)]
        taken = [writings[0].colour]
        found = _lay_out(rng, grammar, ground, rng.sample(free, count), sizes, taken=taken)
        if found is None:
            return None
        things = found
    spans = [(w.y - w.em / 2, w.y + w.em / 2) for w in writings]
    spans += [(t.y - t.side / 2, t.y + t.side / 2) for t in things]
    for i, (top, bottom) in enumerate(spans[: len(writings)]):  # a line of text shares its rows with nothing
        if any(top - GAP < lower and upper < bottom + GAP for upper, lower in spans[i + 1 :]):
            return None
    return Scene("text", ground, things, tuple(writings))


DICE = {2: (3, 5), 3: (2, 4, 6), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8)}  # N -> cells of N things, like the dots of a die
TIDY_STEPS = (1 / 2, 3 / 8, 1 / 4, 1 / 8)
"""Distances between glyphs of a tidy line, as shares of the picture's shorter side, in descending order.

Only lines with the two smaller distances may fill the whole width."""
TIDY_SIDES: dict[Size, float] = {"small": 0.171875, "medium": 0.25, "large": 0.40625}

_BUILDERS = {"things": _things, "relation": _relation, "count": _count, "emoji": _emoji, "text": _text}


def _background(rng: Random, grammar: Grammar) -> Background:
    kind = rng.choices(("flat", "gradient", "split"), (grammar.flat, grammar.gradient, grammar.split))[0]
    if kind == "flat" or len(grammar.grounds) < 2:
        white = "white" in grammar.grounds and rng.random() < grammar.white
        return Background("flat", ("white" if white else rng.choice(grammar.grounds),))
    return Background(kind, tuple(rng.sample(grammar.grounds, 2)), rng.random() < 0.5)


def _size(rng: Random, grammar: Grammar, count: int) -> Size:
    """Draw a thing's size. Things are large only if `count` is small."""
    weights: dict[Size, float] = {"small": 3, "medium": 4, "large": 4 if count == 1 else 2 if count == 2 else 0.001}
    return rng.choices(grammar.sizes, [weights[size] for size in grammar.sizes])[0]


def _cells(rng: Random, count: int) -> list[int]:
    return rng.sample(range(9), count)


def _lay_out(
    rng: Random, grammar: Grammar, ground: Background, cells: Sequence[int], sizes: Sequence[Size],
    emoji: float | None = None, alike: bool = False, taken: Iterable[str] = (),
) -> tuple[Thing, ...] | None:  # fmt: skip
    """Place things in cells of the grid, with gaps between them and to the edge. Returns None if they do not fit."""
    things: list[Thing] = []
    emoji = grammar.emoji_among_things if emoji is None else emoji
    for cell, size in zip(cells, sizes):
        if alike and things:
            name, colour, size, side = things[0].name, things[0].colour, things[0].size, things[0].side
        else:
            name, colour = _name(rng, grammar, ground, emoji, taken)
            if colour is None and size == "small":
                size = "medium"  # small emoji cannot be told apart
            side = TIDY_SIDES[size] if grammar.tidy else round(rng.uniform(*SIDES[size]), 3)
        if not alike and any((name, colour) == (other.name, other.colour) for other in things):
            return None
        for _ in range(6):
            x, y = (_coordinate(rng, grammar, index, side) for index in (cell % 3, cell // 3))
            if all(max(abs(x - o.x), abs(y - o.y)) >= (side + o.side) / 2 + GAP for o in things):
                things.append(Thing(name, colour, size, x, y, side))
                break
        else:
            return None
    return tuple(things)


def _coordinate(rng: Random, grammar: Grammar, cell: int, side: float) -> float:
    """Draw a coordinate near the middle of a third of the picture and away from the picture's edge."""
    if grammar.tidy:
        return on_grid(cell, side)
    x = (2 * cell + 1) / 6 + rng.uniform(-0.05, 0.05)
    x = min(max(x, MARGIN + side / 2), 1 - MARGIN - side / 2)
    return round(min(max(x, cell / 3 + 0.03), (cell + 1) / 3 - 0.03), 3)


def on_grid(cell: int, side: float) -> float:
    """Return the centre on the grid of sixteenths for a cell. A thing with this side keeps the margin to the edge."""
    inset = max(3, math.ceil(16 * (MARGIN + side / 2))) / 16
    return (inset, 0.5, 1 - inset)[cell]


def _name(
    rng: Random, grammar: Grammar, ground: Background, emoji: float, taken: Iterable[str]
) -> tuple[str, str | None]:
    if grammar.emojis and rng.random() < emoji:
        names = emoji_on(ground.colours, grammar.emojis)
        if names:
            return rng.choice(names), None
    seen = [c for c in colours_on(ground) if c not in taken]
    name = rng.choice(_SHAPES[: grammar.shapes])
    return name, rng.choice([c for c in seen if c in grammar.colours] or seen)


def stretch(scene: Scene, width: float, height: float) -> Scene:
    """Adapt a scene of a square picture to another aspect ratio. Things keep their distance to the nearest edge.

    Sides and font sizes are shares of the shorter side and do not change.
    """
    shorter = min(width, height)

    def moved(at: float, length: float) -> float:
        return at if at == 0.5 else at * shorter / length if at < 0.5 else 1 - (1 - at) * shorter / length

    def along(item: T) -> T:
        return replace(item, x=moved(item.x, width), y=moved(item.y, height))

    return replace(scene, things=tuple(map(along, scene.things)), writings=tuple(map(along, scene.writings)))


@lru_cache(maxsize=1024)
def emoji_on(ground: tuple[str, ...], first: int) -> tuple[str, ...]:
    """Return the visible emoji on a background of these colours, among the `first` first emoji."""
    return tuple(name for name in list(EMOJI)[:first] if not any(name in HIDING[colour] for colour in ground))


@lru_cache(maxsize=1024)
def colours_on(ground: Background, text: bool = False) -> tuple[str, ...]:
    """Return the colours that differ enough from all parts of a background. Text also needs a different lightness."""
    rgb = np.array([COLOURS[name] for name in ground.colours], np.float32)
    share = np.linspace(0, 1, 9 if ground.kind == "gradient" else len(rgb))[:, None]
    parts = lab(rgb[0] + (rgb[-1] - rgb[0]) * share)  # (parts, 3)
    away = lab(list(COLOURS.values()))[:, None] - parts  # (colours, parts, 3)
    far = np.linalg.norm(away, axis=-1).min(1) >= (30 if ground.kind == "gradient" else 38)
    readable = abs(away[..., 0]).min(1) >= (22 if ground.kind == "gradient" else 28)
    return tuple(name for name, a, b in zip(COLOURS, far, readable) if a and (b or not text))


def _writing(
    rng: Random, grammar: Grammar, ground: Background, row: int, largest: float, taken: Sequence[str]
) -> Writing | None:
    latin = rng.random() < grammar.english
    text = new_text(rng, grammar, latin)
    faces = [face for face in grammar.faces if latin or face in HANZI_FACES]
    if latin and grammar.tidy and "mono" in faces:
        faces = ["mono"]
    colours = [c for c in colours_on(ground, text=True) if c in grammar.colours and c not in taken]
    if text is None or not faces or not colours:
        return None
    face = rng.choice(faces)
    if grammar.tidy:
        return tidy_writing(text, face, rng.choice(colours), row, min(largest, grammar.em[1]))
    em = min((1 - 2 * MARGIN) / line_width(text, face), largest, grammar.em[1])
    if em < grammar.em[0]:
        return None
    em = round(max(grammar.em[0], em * rng.uniform(0.8, 1)), 3)
    low, high = max(row / 3 + 0.02, MARGIN + em / 2), min((row + 1) / 3 - 0.02, 1 - MARGIN - em / 2)
    y = rng.uniform(low, high) if low < high else (row + 0.5) / 3
    return Writing(text, face, rng.choice(colours), 0.5, round(y, 3), em)


def tidy_writing(text: str, face: str, colour: str, row: int, largest: float) -> Writing | None:
    """Return a line of text with glyphs on a regular grid, or None if it does not fit. Rows are quarters of the height.

    The distance of glyphs is one of TIDY_STEPS. An eighth of 128 pixels is one column of the transformer's patches, so
    a glyph looks the same to the transformer in every cell. The grid needs glyphs of equal width: Hanzi, or face mono.
    """
    pitch = line_width("一" if script_of(text) == "hanzi" else "0", face) + TRACKING  # em
    width = line_width(text, face) / pitch  # in grid steps
    long = max(width, len(text))
    room = {step: 1 if step <= 1 / 4 else 3 / 4 for step in TIDY_STEPS}
    fitting = [step for step in TIDY_STEPS if step / pitch <= largest and step * long <= room[step]]
    if not fitting:
        return None
    return Writing(text, face, colour, 0.5, (row + 1) / 4, fitting[0] / pitch)


def new_text(rng: Random, grammar: Grammar, latin: bool) -> str | None:
    """Draw a text in Latin letters or in Hanzi; None if the grammar has none."""
    return _english(rng, grammar) if latin else _chinese(rng, grammar)


def _english(rng: Random, grammar: Grammar) -> str | None:
    low, high = grammar.letters
    if rng.random() < grammar.spelt:
        length = rng.randint(low, high)
        alphabet = "0123456789" if rng.random() < 0.2 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        return "".join(rng.choice(alphabet) for _ in range(length))
    words = _words_of(low, high)
    if not words:
        return None
    word = rng.choice(words)
    if rng.random() < grammar.capitals:
        return word
    return word.title() if rng.random() < 0.5 else word.lower()


@lru_cache(maxsize=64)
def _words_of(low: int, high: int) -> tuple[str, ...]:
    return tuple(word for word in ENGLISH if low <= len(word) <= high)


def _chinese(rng: Random, grammar: Grammar) -> str | None:
    low, high = grammar.characters
    if rng.random() < grammar.shuffled:
        return "".join(rng.choice(HANZI[: grammar.hanzi]) for _ in range(rng.randint(low, high)))
    words = _chinese_of(low, high, grammar.hanzi)
    return rng.choice(words) if words else None


@lru_cache(maxsize=64)
def _chinese_of(low: int, high: int, hanzi: int) -> tuple[str, ...]:
    known = set(HANZI[:hanzi])
    return tuple(word for word in CHINESE if low <= len(word) <= high and known.issuperset(word))
