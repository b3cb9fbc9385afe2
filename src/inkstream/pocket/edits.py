"""Pairs of scenes, before and after an edit, with instructions as people type them. They teach and test edit models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, get_args

from inkstream.pocket.captions import CHINESE_PLACES
from inkstream.pocket.grammar import (
    TIDY_SIDES,
    Grammar,
    Split,
    colours_on,
    emoji_on,
    new_text,
    on_grid,
    sample,
    tidy_writing,
)
from inkstream.pocket.scenes import GAP, Background, Scene, Size, Thing, is_held_out, is_held_out_text
from inkstream.pocket.vocabulary import CHINESE_COLOURS, CHINESE_EMOJI, MEASURES, SHAPES, with_article
from inkstream.types import InputError

EditKind = Literal["recolour", "move", "remove", "replace", "rewrite", "add"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
Language = Literal["en", "zh"]
TRIES = 2000


@dataclass(frozen=True)
class Edit:
    """One edit. what: the words of its instruction, by role, in scene vocabulary: see `instruction`."""

    kind: EditKind
    before: Scene
    after: Scene
    what: dict[str, str]


def sample_edit(grammar: Grammar, seed: int, split: Split = "train", kind: EditKind | None = None) -> Edit:
    """Return edit number `seed` of a grammar's scenes. Equal numbers give equal edits.

    Split `train` gives only edits whose two scenes have no held-out things or texts; with `held_out`, at least one of
    the scenes has. Raises InputError if the grammar has no such edit.
    """
    rng = Random(f"edit/{seed}")
    kind = kind or rng.choice(EDIT_KINDS)
    for _ in range(TRIES):
        of = "text" if kind == "rewrite" or rng.random() < 0.15 else "things"
        scene = sample(grammar, rng.randrange(1 << 60), "train" if split == "train" else "any", of)
        made = _MAKERS[kind](rng, grammar, replace(scene, kind=of))
        if made is None:
            continue
        held = is_held_out(scene) or is_held_out(made[0])
        if split == "any" or held == (split == "held_out"):
            return Edit(kind, scene, *made)
    raise InputError(f"the grammar has no {split} edit of kind {kind!r}: widen its shapes, colours or objects")


# Kinds. Each returns the scene afterwards and the words of the instruction, or None if it does not fit.

Made = tuple[Scene, dict[str, str]]


def _recolour(rng: Random, grammar: Grammar, scene: Scene) -> Made | None:
    seen = [c for c in colours_on(scene.background) if c in grammar.colours]
    what = rng.random()
    if what < 0.12 and scene.background.kind == "flat":
        new = rng.choice(grammar.grounds)
        ground = Background("flat", (new,))
        visible = {*colours_on(ground)}
        lettering = {*colours_on(ground, text=True)}
        fits = all(
            (t.colour in visible) if t.colour else t.name in emoji_on((new,), grammar.emojis) for t in scene.things
        )
        if new in scene.background.colours or not fits or any(w.colour not in lettering for w in scene.writings):
            return None
        return replace(scene, background=ground), {"target": "background", "colour": new}
    if scene.writings and what < 0.5:
        writing = scene.writings[0]
        seen = [c for c in colours_on(scene.background, text=True) if c in grammar.colours and c != writing.colour]
        if not seen:
            return None
        new = rng.choice(seen)
        return replace(scene, writings=(replace(writing, colour=new),)), {"target": "text", "colour": new}
    thing = _pick(rng, scene, coloured=True)
    if thing is None or not (seen := [c for c in seen if c != thing.colour]):
        return None
    return _with(scene, thing, replace(thing, colour=(new := rng.choice(seen)))), _named(rng, scene, thing, colour=new)


def _move(rng: Random, grammar: Grammar, scene: Scene) -> Made | None:
    thing = _pick(rng, scene)
    if thing is None:
        return None
    cell = rng.randrange(9)
    moved = replace(thing, x=on_grid(cell % 3, thing.side), y=on_grid(cell // 3, thing.side))
    if moved.place == thing.place or not _is_free(_with(scene, thing, None), moved):
        return None
    return _with(scene, thing, moved), _named(rng, scene, thing, place=moved.place)


def _remove(rng: Random, grammar: Grammar, scene: Scene) -> Made | None:
    thing = _pick(rng, scene)
    if thing is None or (len(scene.things) == 1 and not scene.writings and rng.random() < 0.7):
        return None
    return _with(scene, thing, None), _named(rng, scene, thing)


def _replace(rng: Random, grammar: Grammar, scene: Scene) -> Made | None:
    thing = _pick(rng, scene)
    if thing is None:
        return None
    new = _new_thing(rng, grammar, scene, thing.size, thing.x, thing.y)
    if new is None or new.name == thing.name or new.side != thing.side:
        return None
    if new.colour and thing.colour and rng.random() < 0.3:  # only the shape changes
        new = replace(new, colour=thing.colour)
        return _with(scene, thing, new), _named(rng, scene, thing, name=new.name)
    return _with(scene, thing, new), _named(rng, scene, thing, name=new.name, colour=new.colour or "")


def _rewrite(rng: Random, grammar: Grammar, scene: Scene) -> Made | None:
    if len(scene.writings) != 1:
        return None
    old = scene.writings[0]
    text = new_text(rng, grammar, old.script == "latin")
    if text is None or is_held_out_text(text) or text.casefold() == old.text.casefold():
        return None
    largest = 0.26 if scene.things else grammar.em[1]
    new = tidy_writing(text, old.face, old.colour, round(old.y * 4) - 1, min(largest, grammar.em[1]))
    if new is None:
        return None
    after = replace(scene, writings=(new,))
    if any(not _is_clear(new.y, new.em, thing) for thing in scene.things):
        return None
    return after, {"text": new.text, "old": old.text if rng.random() < 0.4 else ""}


def _add(rng: Random, grammar: Grammar, scene: Scene) -> Made | None:
    if len(scene.things) >= 4:
        return None
    size: Size = rng.choice(("small", "medium", "medium", "medium", "large"))
    cell = rng.randrange(9)
    side = TIDY_SIDES[size]
    new = _new_thing(rng, grammar, scene, size, on_grid(cell % 3, side), on_grid(cell // 3, side))
    if new is None or not _is_free(scene, new):
        return None
    after = replace(scene, things=(*scene.things, new))
    open_place = rng.random() < 0.15
    what = {"name": new.name, "colour": new.colour or "", "size": "" if new.size == "medium" else new.size}
    return after, {**what, "place": "" if open_place else new.place}


_MAKERS: dict[EditKind, Callable[[Random, Grammar, Scene], Made | None]] = {
    "recolour": _recolour, "move": _move, "remove": _remove, "replace": _replace, "rewrite": _rewrite, "add": _add,
}  # fmt: skip


def _pick(rng: Random, scene: Scene, coloured: bool = False) -> Thing | None:
    """Return one thing whose name and colour no other thing has; None if there is none. coloured: of a shape."""
    looks = Counter((thing.name, thing.colour) for thing in scene.things)
    own = [one for one in scene.things if looks[one.name, one.colour] == 1 and (one.colour or not coloured)]
    return rng.choice(own) if own else None


def _new_thing(rng: Random, grammar: Grammar, scene: Scene, size: Size, x: float, y: float) -> Thing | None:
    """Return a thing that the scene does not have yet."""
    if rng.random() < grammar.emoji_among_things:
        names = emoji_on(scene.background.colours, grammar.emojis)
        if not names or size == "small":
            return None
        name, colour = rng.choice(names), None
    else:
        seen = [c for c in colours_on(scene.background) if c in grammar.colours]
        if not seen:
            return None
        name, colour = rng.choice(tuple(SHAPES)[: grammar.shapes]), rng.choice(seen)
    if any(thing.name == name for thing in scene.things):
        return None
    return Thing(name, colour, size, x, y, TIDY_SIDES[size])


def _with(scene: Scene, thing: Thing, new: Thing | None) -> Scene:
    """Return a scene with another thing, or none, in the place of one."""
    things = tuple(new if one is thing else one for one in scene.things)
    return replace(scene, things=tuple(one for one in things if one is not None))


def _is_free(scene: Scene, thing: Thing) -> bool:
    apart = all(max(abs(thing.x - o.x), abs(thing.y - o.y)) >= (thing.side + o.side) / 2 + GAP for o in scene.things)
    return apart and all(_is_clear(writing.y, writing.em, thing) for writing in scene.writings)


def _is_clear(y: float, em: float, thing: Thing) -> bool:
    """Return whether a thing shares no rows with a line of text."""
    return thing.y + thing.side / 2 < y - em / 2 - GAP or thing.y - thing.side / 2 > y + em / 2 + GAP


def _named(rng: Random, scene: Scene, thing: Thing, **what: str) -> dict[str, str]:
    """Return the words of an instruction about a thing: its colour is said if another thing has its name."""
    alike = [one for one in scene.things if one.name == thing.name]
    told = thing.colour if thing.colour and (len(alike) > 1 or rng.random() < 0.3) else ""
    return {"target": thing.name, "target colour": told, **what}


# Instructions


def instruction(edit: Edit, language: Language = "en", rng: Random | None = None) -> str:
    """Return an instruction in words. Without a generator it is the plain one, which Pocket's prompt writer gives."""
    return (_english if language == "en" else _chinese)(edit.kind, edit.what, rng)


def _one(rng: Random | None, *wordings: str) -> str:
    return rng.choice(wordings) if rng else wordings[0]


def plain(kind: EditKind, what: dict[str, str]) -> str:
    """Return the plain English instruction of an edit."""
    return _english(kind, what, None)


def _english(kind: EditKind, what: dict[str, str], rng: Random | None) -> str:
    target = "the " + " ".join(word for word in (what.get("target colour"), what.get("target")) if word)
    if kind == "recolour":
        new = what["colour"]
        made = f"make {target} {new}"
        return _one(rng, made, made, f"change {target} to {new}", f"turn {target} {new}")
    if kind == "move":
        place = what["place"]
        moved = f"move {target} to the {place}"
        return _one(rng, moved, moved, f"put {target} at the {place}")
    if kind == "remove":
        return _one(rng, f"remove {target}", f"remove {target}", f"delete {target}", f"take away {target}")
    if kind == "replace":
        new = noun(what)
        return _one(rng, f"replace {target} with {new}", f"replace {target} with {new}", f"turn {target} into {new}")
    if kind == "rewrite":
        text = f'"{what["text"]}"'
        if what.get("old"):
            return _one(rng, f'replace the text "{what["old"]}" with {text}', f'change "{what["old"]}" to {text}')
        return _one(rng, f"change the text to {text}", f"change the text to {text}", f"write {text} instead")
    if not what["place"]:
        return f"add {noun(what)}"
    added = f"{noun(what)} at the {what['place']}"
    return _one(rng, f"add {added}", f"add {added}", f"put {added}")


def noun(what: dict[str, str]) -> str:
    """Return a new thing with its article: a small red heart."""
    name = with_article(what["name"])
    words = [what.get("size", ""), what.get("colour", "")]
    article = name.startswith(("a ", "an "))
    noun = " ".join([*(word for word in words if word), name.partition(" ")[2] if article else name])
    return with_article(noun) if article else noun


def _chinese(kind: EditKind, what: dict[str, str], rng: Random | None) -> str:
    target = _chinese_noun(what.get("target", ""), what.get("target colour", ""))
    if kind == "recolour":
        new = CHINESE_COLOURS[what["colour"]]
        return _one(rng, f"把{target}变成{new}", f"把{target}改成{new}")
    if kind == "move":
        place = CHINESE_PLACES[what["place"]]
        return _one(rng, f"把{target}移到{place}", f"将{target}移到{place}")
    if kind == "remove":
        return _one(rng, f"去掉{target}", f"删除{target}", f"把{target}去掉")
    if kind == "replace":
        new = _chinese_noun(what["name"], what.get("colour", ""))
        return _one(rng, f"把{target}换成{new}", f"用{new}代替{target}")
    if kind == "rewrite":
        text = f"“{what['text']}”"
        return _one(rng, f"把文字改成{text}", f"把“{what['old']}”改成{text}" if what.get("old") else f"文字换成{text}")
    size = {"small": "小的", "large": "大的"}.get(what["size"], "")
    noun = f"一{MEASURES.get(what['name'], '个')}{size}{_chinese_noun(what['name'], what['colour'])}"
    return f"在{CHINESE_PLACES[what['place']]}加{noun}" if what["place"] else _one(rng, f"加{noun}", f"添加{noun}")


def _chinese_noun(name: str, colour: str) -> str:
    names = {**SHAPES, **CHINESE_EMOJI, "background": "背景", "text": "文字"}
    return CHINESE_COLOURS.get(colour, "") + names.get(name, "")
