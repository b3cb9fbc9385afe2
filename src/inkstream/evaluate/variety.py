"""Diversity against the renderer: how much pictures of an open prompt differ from seed to seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from PIL import Image

from inkstream.evaluate.seeing import see, things_of
from inkstream.pocket.draw import render
from inkstream.pocket.vocabulary import SHAPES
from inkstream.pocket.wishes import Wish, read_wish
from inkstream.pocket.writer import write

PROPERTIES = ("place", "size", "colour", "background")


@dataclass(frozen=True)
class Variety:
    """Diversity in one property. ratio: 0 if seeds make no difference, 1 if they differ as much as the renderer's."""

    ratio: float
    prompts: int  # prompts that leave the property open, once for each property
    pictures: int  # drawn pictures that were compared, once for each property


def variety(drawn: Iterable[tuple[str, int, Image.Image]]) -> dict[str, Variety]:
    """Return the diversity over seeds against the renderer's, in each of PROPERTIES and in all of them ("all").

    drawn: prompt, seed and picture. The spread of a property is the share, 0 to 1, of pairs of a prompt's pictures in
    which the property differs: the cell of the 3 x 3 grid, the size (small, medium, large) or the colour of a thing, or
    the background, as the graders see them. The result is the sum of the spreads over all prompts that leave the
    property open, divided by the same sum for the pictures that the renderer draws for the same prompts and seeds. It
    has no unit: 0 if all seeds give equal pictures, 1 for the renderer's own pictures, and more than 1 if the model
    varies more than the renderer. Only drawn pictures with exactly the prompt's things count, so a wrong thing adds
    no diversity. Left out are prompts with a text, without a thing, or with fewer than two such pictures. A property is
    left out if the renderer's pictures do not differ in it.
    """
    groups: dict[str, list[tuple[int, Image.Image]]] = {}
    for prompt, seed, picture in drawn:
        groups.setdefault(prompt, []).append((seed, picture))
    spreads: dict[str, list[tuple[float, float, int]]] = {name: [] for name in PROPERTIES}
    for prompt, pictures in groups.items():
        wish = read_wish(prompt)
        opened = open_things(wish)
        if not opened or len(pictures) < 2:
            continue
        ours = _looks(wish, opened, (picture for _, picture in pictures))
        scenes = [(write(prompt, seed).scene, picture.size) for seed, picture in pictures]
        theirs = _looks(wish, opened, (render(scene, *size) for scene, size in scenes if scene is not None))
        if min(len(ours), len(theirs)) < 2:
            continue
        for name in opened:
            own, other = (spread([look[name] for look in looks]) for looks in (ours, theirs))
            spreads[name].append((own, other, len(ours)))
    spreads["all"] = [spread for name in PROPERTIES for spread in spreads[name]]
    return {
        name: Variety(sum(ours for ours, _, _ in found) / whole, len(found), sum(count for _, _, count in found))
        for name, found in spreads.items()
        if (whole := sum(theirs for _, theirs, _ in found)) > 0
    }


def spread(values: Sequence[Hashable]) -> float:
    """Return the share of pairs of values that differ. There must be two values or more."""
    pairs = list(combinations(values, 2))
    return sum(a != b for a, b in pairs) / len(pairs)


def open_things(wish: Wish) -> dict[str, frozenset[str]]:
    """Return the properties that a prompt leaves open, with the names of the things whose property is open.

    A relation and a number of equal things state all places. The result is empty if the prompt has a text or no thing.
    """
    if wish.texts or not wish.things:
        return {}
    names = {thing.name for thing in wish.things}
    alike = len(wish.things) == 1 and wish.things[0].number > 1
    placed = names if wish.relation or alike else {thing.name for thing in wish.things if thing.place}
    sized = {thing.name for thing in wish.things if thing.size}
    coloured = {thing.name for thing in wish.things if thing.colour or thing.name not in SHAPES}
    stated = {"place": placed, "size": sized, "colour": coloured}
    found = {name: frozenset(names - some) for name, some in stated.items() if names - some}
    return found if wish.ground_colours else {**found, "background": frozenset()}


def _looks(
    wish: Wish, opened: Mapping[str, frozenset[str]], pictures: Iterable[Image.Image]
) -> list[dict[str, Hashable]]:
    """Return the open properties of each picture whose things are exactly the prompt's, as the graders see them."""
    wanted = Counter[str | None]()
    for thing in wish.things:
        wanted[thing.name] += thing.number
    looks = []
    for picture in pictures:
        seen = see(picture)
        things = things_of(seen)
        if Counter(thing.name for thing in things) == wanted:
            look: dict[str, Hashable] = {
                name: tuple(sorted((str(thing.name), getattr(thing, name)) for thing in things if thing.name in some))
                for name, some in opened.items()
                if name != "background"
            }
            looks.append(look | ({"background": seen.background} if "background" in opened else {}))
    return looks
