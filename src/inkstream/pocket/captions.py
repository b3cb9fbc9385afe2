"""Captions of scenes: dense, short or tag-like, in English or Chinese. Written text is in quotes.

Without a random generator, the wording is the plain wording of the suites. With one, the wording varies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

from inkstream.pocket.scenes import Background, Scene, Thing, Writing
from inkstream.pocket.vocabulary import (
    CHINESE_COLOURS,
    CHINESE_EMOJI,
    FACES,
    MEASURES,
    SHAPES,
    plural,
    with_article,
)

Style = Literal["dense", "short", "tags"]
Language = Literal["en", "zh"]
T = TypeVar("T")

STATES: dict[Style, frozenset[str]] = {
    "dense": frozenset({"background", "size", "place", "writing colour", "writing place"}),
    "short": frozenset(),
    "tags": frozenset({"background", "place", "writing colour"}),
}
"""Facts that a caption of each style states, in addition to things, colours, numbers, relations and written text."""

NUMBERS = ("zero", "one", "two", "three", "four", "five")
WORDS = frozenset(
    """
    a an and at background big bold bottom center characters corner fading from gradient image in into large left
    letters lower mono of on one picture plain poster right says saying sans serif sign small split text that the there
    is thin to top upper with word words writing written above below middle half side two three four five
    """.split()  # noqa: SIM905
)
"""All English words of captions, outside quotes, that are not names of things or colours."""


@dataclass(frozen=True)
class Wording:
    """Shares of styles and languages in captions. A recipe's [data.wording] table sets them."""

    dense: float = 0.7
    partial: float = 0.0  # dense captions without some of: background, sizes, places, look of text
    short: float = 0.2
    tags: float = 0.1
    english: float = 0.6  # share of English captions; the others are Chinese
    plain: float = 0.5  # share of captions with the plain wording of the suites


def draw_caption(scene: Scene, wording: Wording, rng: Random) -> str:
    """Draw a random caption of a scene."""
    shares = (wording.dense, wording.partial, wording.short, wording.tags)
    form = rng.choices(("dense", "partial", "short", "tags"), shares)[0]
    style: Style = "dense" if form == "partial" else form
    stated = frozenset(fact for fact in sorted(STATES[style]) if form != "partial" or rng.random() < 0.5)
    language = "en" if rng.random() < wording.english else "zh"
    return caption(scene, style, language, None if rng.random() < wording.plain else rng, stated)


def caption(
    scene: Scene, style: Style = "dense", language: Language = "en", rng: Random | None = None,
    stated: frozenset[str] | None = None,
) -> str:  # fmt: skip
    """Return a caption of a scene. Without a generator, it is always the same.

    stated: facts to state in addition to things, colours, numbers, relations and text; None: the facts of the style.
    """
    stated = STATES[style] if stated is None else stated
    if language == "zh":
        return _chinese(scene, style, stated, rng)
    text = _english(scene, style, stated, rng)
    if rng and rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    if rng and style != "tags" and rng.random() < 0.3:
        text += "."
    return text


def _one(rng: Random | None, wordings: Sequence[T]) -> T:
    """Return a random wording, or the first one without a generator."""
    return rng.choice(wordings) if rng else wordings[0]


# English


def _english(scene: Scene, style: Style, stated: frozenset[str], rng: Random | None) -> str:
    parts = [_english_things(scene, style, stated, rng)] if scene.things else []
    parts += [_english_writing(writing, style, stated, rng) for writing in scene.writings]
    if scene.writings and (style == "short" or (rng and rng.random() < 0.5)):
        parts.reverse()
    if style == "tags":
        return ", ".join([*parts, *([_english_ground(scene.background, bare=True)] if "background" in stated else [])])
    if "background" not in stated:
        text = " and ".join(parts)
        return _one(rng, ["", "", "a picture of ", "an image of "]) + text if scene.kind != "text" else text
    if rng and rng.random() < 0.2:
        return f"{with_article(_english_ground(scene.background, bare=True))} with " + ", ".join(parts)
    return ", ".join([*parts, f"on {with_article(_english_ground(scene.background))}"])


def _english_ground(ground: Background, bare: bool = False) -> str:
    first, *rest = ground.colours
    if ground.kind == "flat":
        return f"{first} background"
    start, end = ("left", "right") if ground.across else ("top", "bottom")
    if ground.kind == "gradient":
        return f"gradient from {first} {start} to {rest[0]} {end}"
    return f"split background, {first} {start}" + (" and " if not bare else ", ") + f"{rest[0]} {end}"


def _english_things(scene: Scene, style: Style, stated: frozenset[str], rng: Random | None) -> str:
    if scene.kind == "count":
        thing, count = scene.things[0], len(scene.things)
        number = _one(rng, [NUMBERS[count], NUMBERS[count], str(count)])
        return f"{number} {_adjectives(thing, stated)}{plural(thing.name)}"
    if scene.relation:
        first, second = (_english_thing(thing, style, stated, rng, placed=False) for thing in scene.things)
        wordings = {"left of": ["to the left of", "left of"], "right of": ["to the right of", "right of"]}
        return f"{first} {_one(rng, wordings.get(scene.relation, [scene.relation]))} {second}"
    things = [_english_thing(thing, style, stated, rng) for thing in scene.things]
    if style == "short" and len(things) > 1:
        return f"{', '.join(things[:-1])} and {things[-1]}"
    return ", ".join(things)


def _adjectives(thing: Thing, stated: frozenset[str]) -> str:
    words = [thing.size] if "size" in stated and thing.size != "medium" else []
    return "".join(f"{word} " for word in (*words, *([thing.colour] if thing.colour else ())))


def _english_thing(thing: Thing, style: Style, stated: frozenset[str], rng: Random | None, placed: bool = True) -> str:
    noun = with_article(thing.name)
    article = noun.startswith(("a ", "an "))  # "grapes" and "cherries" have no article
    noun = _adjectives(thing, stated) + (noun.partition(" ")[2] if article else noun)
    placed = placed and "place" in stated
    if style == "tags":
        return noun + (f" {thing.place}" if placed else "")
    name = with_article(noun) if article else noun
    return f"{name} {_english_place(thing.place, rng)}" if placed else name


def _english_place(place: str, rng: Random | None) -> str:
    if place in ("left", "right"):
        return f"on the {place}"
    if place == "center":
        return _one(rng, ["in the center", "in the middle"])
    return _one(rng, [f"at the {place}", f"in the {place} corner"]) if " " in place else f"at the {place}"


def _english_writing(writing: Writing, style: Style, stated: frozenset[str], rng: Random | None) -> str:
    left, right = _one(rng, ['""', '""', "“”"])
    quoted = f"{left}{writing.text}{right}"
    noun = "text" if writing.script == "hanzi" else _one(rng, ["word" if " " not in writing.text else "words", "text"])
    if style == "tags":
        return f"{writing.colour} {noun} {quoted}" if "writing colour" in stated else f"{noun} {quoted}"
    if not stated & {"writing colour", "writing place"}:
        return _one(rng, [f"the {noun} {quoted}", f"a poster that says {quoted}", f"a sign saying {quoted}", quoted])
    words = [_one(rng, [f"the {noun} {quoted}", f"{quoted} written"])]
    if "writing colour" in stated:
        face = "thin" if writing.face == "sans" else writing.face
        words.append(_one(rng, [f"in {face} {writing.colour} letters", f"in {writing.colour}"]))
    if "writing place" in stated:
        words.append("in the middle" if writing.place == "middle" else f"at the {writing.place}")
    return " ".join(words)


# Chinese

CHINESE_PLACES = {
    "top left": "左上角", "top": "上方", "top right": "右上角", "left": "左侧", "center": "中间", "right": "右侧",
    "bottom left": "左下角", "bottom": "下方", "bottom right": "右下角", "middle": "中间",
}  # fmt: skip
_RELATIONS = {"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"}
_SIZES = {"small": "小的", "medium": "", "large": "大的"}


def _chinese(scene: Scene, style: Style, stated: frozenset[str], rng: Random | None) -> str:
    parts = [_chinese_things(scene, style, stated, rng)] if scene.things else []
    parts += [_chinese_writing(writing, style, stated, rng) for writing in scene.writings]
    if scene.writings and (style == "short" or (rng and rng.random() < 0.5)):
        parts.reverse()
    if "background" in stated:
        ground = _chinese_ground(scene.background)
        parts = [ground, *parts] if rng and rng.random() < 0.3 else [*parts, ground]
    return "，".join(parts)


def _chinese_ground(ground: Background) -> str:
    first, *rest = (CHINESE_COLOURS[colour] for colour in ground.colours)
    if ground.kind == "flat":
        return f"{first}背景"
    start, end = "左右" if ground.across else "上下"
    return (
        f"背景从{start}{first}渐变到{end}{rest[0]}"
        if ground.kind == "gradient"
        else f"背景{start}半{first}{end}半{rest[0]}"
    )


def _chinese_things(scene: Scene, style: Style, stated: frozenset[str], rng: Random | None) -> str:
    if scene.kind == "count":
        number = _one(rng, [" 一两三四五"[len(scene.things)], str(len(scene.things))])
        return _chinese_thing(scene.things[0], style, stated, rng, number, placed=False)
    if scene.relation:
        first, second = (_chinese_thing(thing, style, stated, rng, placed=False) for thing in scene.things)
        return f"{first}在{second}的{_RELATIONS[scene.relation]}"
    things = [_chinese_thing(thing, style, stated, rng) for thing in scene.things]
    if style == "short" and len(things) > 1:
        return f"{'、'.join(things[:-1])}和{things[-1]}"
    return "，".join(things)


def _chinese_thing(
    thing: Thing, style: Style, stated: frozenset[str], rng: Random | None, number: str = "一", placed: bool = True
) -> str:
    placed = placed and "place" in stated
    name = SHAPES[thing.name] if thing.colour else CHINESE_EMOJI[thing.name]
    described = (CHINESE_COLOURS[thing.colour] if thing.colour else "") + name
    if style == "tags" and number == "一":
        return CHINESE_PLACES[thing.place] + described if placed else described
    counted = f"{number}{MEASURES.get(thing.name, '个')}{_SIZES[thing.size] if 'size' in stated else ''}{described}"
    if not placed:
        return counted
    return CHINESE_PLACES[thing.place] + _one(rng, ["", "有", "是"]) + counted


def _chinese_writing(writing: Writing, style: Style, stated: frozenset[str], rng: Random | None) -> str:
    left, right = _one(rng, ["“”", "“”", "「」", '""'])
    quoted = f"{left}{writing.text}{right}"
    colour = CHINESE_COLOURS[writing.colour]
    if style == "tags":
        return f"{colour}文字{quoted}" if "writing colour" in stated else f"文字{quoted}"
    if not stated & {"writing colour", "writing place"}:
        return _one(rng, [f"文字{quoted}", f"写着{quoted}", f"写着{quoted}的海报", quoted])
    place = CHINESE_PLACES[writing.place] if "writing place" in stated else ""
    face = _one(rng, [FACES[writing.face], ""])
    look = f"{colour}{face}" if "writing colour" in stated else ""
    return f"{place}写着{look}{_one(rng, ['的', '文字'])}{quoted}"
