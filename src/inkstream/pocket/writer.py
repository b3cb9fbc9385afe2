"""Pocket's prompt writer: it rewrites a prompt as a dense caption and draws missing details from the seed.

It has the role of Z-Image's prompt enhancer, but uses no language model. `wishes.py` parses the prompt, the writer
composes a scene from it, and the model gets the scene's dense caption.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import cast

from inkstream.pocket.captions import caption
from inkstream.pocket.colours import COLOURS
from inkstream.pocket.grammar import DICE, TIDY_SIDES, colours_on, emoji_on, on_grid, tidy_writing
from inkstream.pocket.kept import Kept, keep_unknown
from inkstream.pocket.scenes import GAP, PLACES, Background, Scene, Size, Thing, Writing, relation_holds, script_of
from inkstream.pocket.vocabulary import EMOJI, HANZI, LATIN, SHAPES
from inkstream.pocket.wishes import Wish, WishedText, WishedThing, read_wish, tokens_of

KNOWN = "pocket knows shapes, emoji, words and colours"
MOST_THINGS = 5
NAMED = 6
"""Words that a note names; it counts the others."""
LEAST_GAP = 0.01
"""Smallest gap between things, used if the larger GAP gave no scene: the prompt may set all places and sizes."""
MOST_LETTERS, MOST_HANZI = 8, 4


@dataclass(frozen=True)
class Written:
    """A rewritten prompt. prompt: the model's input; scene: the intended picture, or None if there is none; notes: one
    line for each request that was not understood or cannot be drawn."""

    prompt: str
    scene: Scene | None
    notes: tuple[str, ...] = ()


def write(prompt: str, seed: int, negative: str = "", keep: bool | Collection[str] = False) -> Written:
    """Rewrite a prompt for Pocket. Equal prompts and seeds give equal results.

    negative: names and colours that the writer does not choose by itself. keep: words that are not known stay, because
    an adapter knows them: all (True), or only these, in lower case. The scene has stand-ins for them.
    """
    kept = keep_unknown(prompt, None if keep is True else keep) if keep else Kept(prompt, {})
    wish = read_wish(kept.prompt)
    wish.without |= {token.value for token in tokens_of(negative) if token.kind in ("thing", "colour")}
    notes = list(_notes(wish))
    if wish.empty and prompt.strip() and not wish.unknown:
        notes.append(f"{KNOWN}; the prompt names none of them")
    if wish.empty:
        return Written(prompt, None, tuple(notes))
    rng = Random(f"{seed}/{prompt}")
    for attempt in range(400):
        scene = _compose(wish, rng, GAP if attempt < 300 else LEAST_GAP)
        if scene is not None:
            return Written(kept.put_back(caption(scene)), scene, tuple(notes))
    return Written(prompt, None, (*notes, "the things do not fit into one picture: ask for fewer or smaller ones"))


def _notes(wish: Wish) -> list[str]:
    notes = []
    if wish.unknown:
        notes.append(f"{KNOWN}; it cannot draw: {_listed(wish.unknown)}")
    if (count := sum(thing.number for thing in wish.things)) > MOST_THINGS:
        notes.append(f"pocket draws at most {MOST_THINGS} things, not {count}: the others are left out")
    for thing in wish.things:
        if thing.name in wish.without:
            notes.append(f"the prompt asks for {thing.name} and also excludes it: it is drawn")
    if len(wish.texts) > 1:
        notes.append(f"pocket writes one text: {_listed([repr(text.text) for text in wish.texts[1:]])} is left out")
    for text in wish.texts[:1]:
        most = MOST_HANZI if script_of(text.text) == "hanzi" else MOST_LETTERS
        if len(text.text) > most:
            notes.append(f"pocket writes at most {most} characters, {text.text!r} has {len(text.text)}")
        if unknown := [c for c in text.text if c not in LATIN and c not in HANZI and c != " "]:
            notes.append(f"pocket cannot write {' '.join(dict.fromkeys(unknown))}")
    return notes


def _listed(words: Sequence[str]) -> str:
    """The first words as a list, and how many more there are."""
    more = len(words) - NAMED
    return ", ".join(words[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _compose(wish: Wish, rng: Random, gap: float) -> Scene | None:
    """Compose a scene from a wish. Returns None if the random choices do not fit."""
    wished = [thing for thing in wish.things for _ in range(thing.number)][:MOST_THINGS]
    text = next((text for text in wish.texts[:1] if _writable(text)), None)
    ground = _ground(wish, wished, text, rng)
    writing = None
    taken: list[str] = []
    if text is not None:
        writing = _writing(text, ground, bool(wished), wish.without, rng)
        if writing is None:
            return None
        taken.append(writing.colour)
    alike = len(wish.things) == 1 and len(wished) > 1
    pair = wish.relation is not None and len(wish.things) == 2 and len(wished) == 2 and writing is None
    cells = _cells(wish, wished, alike, pair, writing, rng)
    if cells is None:
        return None
    things = _things(wish, wished, cells, ground, taken, gap, rng)
    if things is None or (writing is not None and not _apart(writing, things, gap)):
        return None
    if writing is not None:
        return Scene("text", ground, things, (writing,))
    if not things:
        return Scene("things", ground)
    if alike and not any(thing.place for thing in wish.things):
        return Scene("count", ground, things)
    if pair:
        first, second = ((thing.x, thing.y) for thing in things)
        relation = next((name for name in _sides(wish.relation) if relation_holds(name, first, second)), None)
        return Scene("relation", ground, things, relation=relation) if relation else None
    return Scene("emoji" if all(thing.colour is None for thing in things) else "things", ground, things)


def _writable(text: WishedText) -> bool:
    return all(c in LATIN or c in HANZI or c == " " for c in text.text)


def _sides(relation: str | None) -> tuple[str, ...]:
    return ("left of", "right of") if relation == "beside" else (relation or "",)


def _ground(wish: Wish, wished: Sequence[WishedThing], text: WishedText | None, rng: Random) -> Background:
    """Return the requested background, or a random flat one on which all requested items are visible."""
    across = rng.random() < 0.5 if wish.across is None else wish.across
    if wish.ground_colours:
        colours = list(wish.ground_colours)
        kind = wish.ground if wish.ground in ("gradient", "split") else "flat"
        if kind != "flat" and len(colours) < 2:
            colours.append(rng.choice([c for c in COLOURS if c not in (*colours, *wish.without)]))
        return Background(cast(str, kind), tuple(colours), across)  # type: ignore[arg-type]
    grounds = [Background("flat", (colour,)) for colour in COLOURS if colour not in wish.without]
    seen = [ground for ground in grounds if _all_seen(ground, wished, text)] or grounds
    white = [ground for ground in seen if ground.colours == ("white",)]
    return white[0] if white and rng.random() < 0.4 else rng.choice(seen)


def _all_seen(ground: Background, wished: Sequence[WishedThing], text: WishedText | None) -> bool:
    emoji, colours = emoji_on(ground.colours, len(EMOJI)), colours_on(ground)
    things = all(t.name in emoji if t.name not in SHAPES else t.colour in (None, *colours) for t in wished)
    return things and (text is None or text.colour in (None, *colours_on(ground, text=True)))


def _writing(
    text: WishedText, ground: Background, beside: bool, without: set[str], rng: Random
) -> Writing | None:  # fmt: skip
    face = "bold" if script_of(text.text) == "hanzi" else "mono"
    row = {"top": 0, "middle": 1, "bottom": 2}[text.place or rng.choice(["top", "bottom"] if beside else ["middle"])]
    most = MOST_HANZI if face == "bold" else MOST_LETTERS
    free = [c for c in colours_on(ground, text=True) if c not in without]
    colour = text.colour or rng.choice(free or list(COLOURS))
    return tidy_writing(text.text[:most], face, colour, row, 0.26 if beside else 0.5)


_PAIRS = {"left of": (3, 5), "right of": (5, 3), "above": (1, 7), "below": (7, 1)}


def _cells(
    wish: Wish, wished: Sequence[WishedThing], alike: bool, pair: bool, writing: Writing | None, rng: Random
) -> list[int] | None:  # fmt: skip
    """Return a cell of the 3 x 3 grid for each thing: the requested cell or a free one. None if there are too few."""
    row = None if writing is None else int(writing.y * 4) - 1
    if alike and not any(thing.place for thing in wished) and row is None:
        return list(DICE[len(wished)])
    if pair and not any(thing.place for thing in wished):
        return list(_PAIRS[rng.choice(_sides(wish.relation))])
    if wish.relation and len(wish.things) == 2 and row is None and not any(thing.place for thing in wished):
        return _two_groups(rng.choice(_sides(wish.relation)), [thing.number for thing in wish.things], rng)
    free = [cell for cell in range(9) if row is None or cell // 3 != row]
    if len(wished) == 1 and row is None and rng.random() < 0.4:
        free = [4]  # a single thing is in the middle more often
    asked = [PLACES.index(thing.place) if thing.place else None for thing in wished]
    if len(set(asked) - {None}) < sum(place is not None for place in asked):
        asked = [place if place not in asked[:i] else None for i, place in enumerate(asked)]
    free = [cell for cell in free if cell not in asked]
    rng.shuffle(free)
    if len(free) < asked.count(None):
        return None
    return [free.pop() if place is None else place for place in asked]


def _two_groups(relation: str, numbers: Sequence[int], rng: Random) -> list[int] | None:
    """Return the cells of two groups of things, each in a line on opposite sides of the picture."""
    first = 0 if relation in ("left of", "above") else 2
    lines = [rng.sample(range(3), number) if number <= 3 else None for number in numbers]
    if None in lines:
        return None
    sideways = relation in ("left of", "right of")
    return [3 * i + at if sideways else 3 * at + i for at, line in zip((first, 2 - first), lines) for i in line or ()]


def _things(
    wish: Wish, wished: Sequence[WishedThing], cells: Sequence[int], ground: Background, taken: Sequence[str],
    gap: float, rng: Random,
) -> tuple[Thing, ...] | None:  # fmt: skip
    things: list[Thing] = []
    for thing, cell in zip(wished, cells):
        if things and thing is wished[len(things) - 1]:  # same kind of thing again
            colour, size = things[-1].colour, things[-1].size
        else:
            colour, size = _colour(wish, thing, ground, [*taken, *(t.colour or "" for t in things)], rng), thing.size
            size = size or _size(len(wished), thing.name, rng)
        side = TIDY_SIDES[size]
        x, y = on_grid(cell % 3, side), on_grid(cell // 3, side)
        if any(max(abs(x - o.x), abs(y - o.y)) < (side + o.side) / 2 + gap for o in things):
            return None
        things.append(Thing(thing.name, colour, size, x, y, side))
    return tuple(things)


def _colour(wish: Wish, thing: WishedThing, ground: Background, taken: Sequence[str], rng: Random) -> str | None:
    if thing.name not in SHAPES or thing.colour:
        return thing.colour if thing.name in SHAPES else None
    seen = [c for c in colours_on(ground) if c not in wish.without]
    return rng.choice([c for c in seen if c not in taken] or seen or list(COLOURS))


def _size(count: int, name: str, rng: Random) -> Size:
    weights = (0 if name not in SHAPES else 1, 3, 4 if count == 1 else 2 if count == 2 else 0)
    return cast(Size, rng.choices(("small", "medium", "large"), weights)[0])


def _apart(writing: Writing, things: Sequence[Thing], gap: float) -> bool:
    """Return whether no thing shares the rows of the text."""
    top, bottom = writing.y - writing.em / 2, writing.y + writing.em / 2
    return all(t.y + t.side / 2 < top - gap or t.y - t.side / 2 > bottom + gap for t in things)
