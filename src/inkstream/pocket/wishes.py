"""Parses a user's prompt with the grammar of scenes, in English or Chinese.

The parser has two steps. The lexer splits the prompt into typed tokens by the longest match in `wishes.toml` and
`vocabulary.toml`. Then one pass over the tokens assigns numbers, sizes, colours and places to things.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from inkstream.pocket.colours import nearest_colour
from inkstream.pocket.scenes import PLACES, SIDES, Size
from inkstream.pocket.vocabulary import (
    CHINESE_COLOURS,
    CHINESE_EMOJI,
    EMOJI,
    SHAPES,
    plural,
    with_article,
)


class Token(NamedTuple):
    """A token of a prompt. said: its words in the prompt.

    kind: thing, colour, size, place, relation, number, times, text, end, colon, unknown, or a key of [words].
    """

    kind: str
    value: Any
    said: str


@dataclass
class WishedThing:
    """A thing that a prompt asks for. None: the prompt does not say."""

    name: str
    number: int = 1
    colour: str | None = None
    size: Size | None = None
    place: str | None = None


@dataclass
class WishedText:
    """A text that a prompt asks for. place: top, middle or bottom."""

    text: str
    colour: str | None = None
    place: str | None = None


@dataclass
class Wish:
    """The parsed contents of a prompt."""

    things: list[WishedThing] = field(default_factory=list)
    texts: list[WishedText] = field(default_factory=list)
    relation: str | None = None  # position of things[0] relative to things[1]; "beside" means left of or right of
    ground: str | None = None  # flat, gradient or split
    ground_colours: list[str] = field(default_factory=list)
    across: bool | None = None
    without: set[str] = field(default_factory=set)  # names and colours that must not appear
    unknown: list[str] = field(default_factory=list)  # words that were not understood, as in the prompt

    @property
    def empty(self) -> bool:
        """Whether the parser found no thing, text or background."""
        return not (self.things or self.texts or self.ground_colours)


def read_wish(prompt: str) -> Wish:
    """Parse a prompt."""
    return _Reader(list(tokens_of(prompt))).read()


# Tokens


_QUOTED = re.compile(
    r"\"([^\"\n]*)\"|“([^”\n]*)”|「([^」\n]*)」|『([^』\n]*)』|(?<![\w])'([^'\n]+)'(?!\w)|‘([^’\n]*)’|《([^》\n]*)》"
)
_SAYS = re.compile(
    r"\b(?:says|saying|say|reads|reading|labell?ed|titled|the words?|the text|text:)\s+([A-Z0-9!?&%+#$-]{1,12})\b"
)
_WRITE_HANZI = re.compile(
    r"(?:写着|写有|写上|写|\b(?:write|writes|says|saying|reads|text|words?)\s*:?)\s*([\u4e00-\u9fff]{1,4})(?![\u4e00-\u9fff]|\s*[“「『《\"])"
)
_HEX = re.compile(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b")
_WORD = re.compile(r"[a-z0-9]+(?:['’-]+[a-z0-9]+)*", re.IGNORECASE)
_HANZI = re.compile(r"[\u4e00-\u9fff]+")
_TIMES = re.compile(r"(?:[x×*]\s?([1-9])|([1-9])\s?[x×])(?![\w])", re.IGNORECASE)
_SPELT = re.compile(r"\b(?:letters?|numbers?|digits?|words?|text)\s+([A-Za-z0-9!?&%+#$-]{1,12})\b", re.IGNORECASE)
_THE_WORD = re.compile(r"the (?:word|text) (\w+)\b", re.IGNORECASE)
_LOUD = re.compile(r"[A-Z0-9&!%+$#-]*[A-Z][A-Z0-9&!%+$#-]+(?!\w)")
_END = re.compile(r"[,.;!?/|，。；！？、\n]")


def tokens_of(prompt: str) -> Iterator[Token]:
    """Yield the typed tokens of a prompt, in order."""
    at = 0
    quiet = prompt.upper() != prompt  # not all capitals: a word in capitals is then text
    while at < len(prompt):
        if found := _QUOTED.match(prompt, at):
            text = next(group for group in found.groups() if group is not None).strip()
            if text:
                yield Token("text", text, found[0])
        elif found := _SAYS.match(prompt, at):
            yield Token("text", found[1], found[1])
        elif found := _hanzi_to_write(prompt, at) or _THE_WORD.match(prompt, at) or _spelt(prompt, at, quiet):
            yield Token("text", found[1], found[0])
        elif found := _TIMES.match(prompt, at):
            yield Token("times", int(found[1] or found[2]), found[0])
        elif found := _HEX.match(prompt, at):
            yield Token("colour", nearest_colour(_rgb(found[0])), found[0])
        elif quiet and (found := _LOUD.match(prompt, at)):
            yield Token("text", found[0], found[0])
        elif prompt[at] in ":：":
            yield Token("colon", ":", prompt[at])
            at += 1
            continue
        elif found := _END.match(prompt, at):
            yield Token("end", found[0], found[0])
        elif prompt[at] in _glyphs():
            yield Token("thing", _glyphs()[prompt[at]], prompt[at])
            at += 1
            continue
        elif _WORD.match(prompt, at):
            words = _words_from(prompt, at)
            token, used = _english(words)
            found = words[used - 1]
            yield token
        elif found := _HANZI.match(prompt, at):
            token, length = _chinese(found[0])
            yield token
            at += length
            continue
        else:
            at += 1
            continue
        at = found.end()


def _hanzi_to_write(prompt: str, at: int) -> re.Match[str] | None:
    """Match unquoted Chinese text: '写着面馆' and 'write 面馆', but not '写着红色的“面馆”'."""
    found = _WRITE_HANZI.match(prompt, at)
    return None if found is None or _chinese(found[1])[0].kind in ("colour", "size", "letters") else found


def _spelt(prompt: str, at: int, quiet: bool) -> re.Match[str] | None:
    """Match unquoted text: 'the letter A' and 'number 47', but not 'letters in red'."""
    found = _SPELT.match(prompt, at)
    if found is None or (found[1].lower() in _english_names() and not (quiet and found[1].isupper())):
        return None
    return found


def _rgb(code: str) -> tuple[int, ...]:
    """Convert '#F60' or '#FF6600' to (255, 102, 0)."""
    digits = code[1:] if len(code) == 7 else "".join(digit * 2 for digit in code[1:])
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def _words_from(prompt: str, at: int) -> list[re.Match[str]]:
    """Return the next consecutive words, at most 5, which is the length of the longest name."""
    found = []
    while (word := _WORD.match(prompt, at)) and len(found) < 5:
        found.append(word)
        at = word.end()
        while at < len(prompt) and prompt[at] == " ":
            at += 1
    return found


def _english(words: list[re.Match[str]]) -> tuple[Token, int]:
    """Return the token of the longest known name at the start, and its number of words. Typing errors are corrected."""
    names = _english_names()
    for length in range(len(words), 0, -1):
        said = " ".join(word[0] for word in words[:length])
        if (kind_value := names.get(said.lower())) is not None:
            return Token(*kind_value, said), length
    said = words[0][0]
    near = difflib.get_close_matches(said.lower(), _long_names(), 1, 0.8 if len(said) > 4 else 0.85)
    near = near if len(said) > 3 else []
    return (Token(*names[near[0]], said) if near else Token("unknown", said, said)), 1


def _chinese(text: str) -> tuple[Token, int]:
    """Return the token of the longest known name at the start of the text, and its length."""
    names = _chinese_names()
    for length in range(min(len(text), 8), 0, -1):
        if (kind_value := names.get(text[:length])) is not None:
            return Token(*kind_value, text[:length]), length
    length = next((i for i in range(1, len(text)) if _starts_a_name(text[i:])), len(text))
    return Token("unknown", text[:length], text[:length]), length


def _starts_a_name(text: str) -> bool:
    return any(text[:length] in _chinese_names() for length in range(1, 9))


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Any]:
    return tomllib.loads((Path(__file__).parent / "wishes.toml").read_text("utf-8"))


def _kinds() -> Iterator[tuple[str, Any, list[str], list[str]]]:
    """Yield (kind, value, English names, Chinese names)."""
    table = _table()
    for name, own in {**SHAPES, **CHINESE_EMOJI}.items():
        english, chinese = _names(table["things"].get(name, ""))
        words = [name, *english]
        forms = [form for word in words for form in (word, plural(word), with_article(word).partition(" ")[2] or word)]
        yield "thing", name, forms, [own, *chinese]
    for kind in ("colour", "size", "place", "relation"):
        for name, line in table[kind + "s"].items():
            english, chinese = _names(line)
            own = [CHINESE_COLOURS[name]] if kind == "colour" else []
            yield kind, name, [name, *english], own + chinese
    for number, line in table["numbers"].items():
        english, chinese = _names(line)
        yield "number", int(number), [number, *english], chinese
    for kind, line in table["words"].items():
        yield kind, kind, *_names(line)


def _names(line: str) -> tuple[list[str], list[str]]:
    """Split 'upper_left left_top|左上 左上方' into English names and Chinese names."""
    english, _, chinese = line.partition("|")
    return [name.replace("_", " ") for name in english.split()], chinese.split()


@lru_cache(maxsize=1)
def _english_names() -> dict[str, tuple[str, Any]]:
    names: dict[str, tuple[str, Any]] = {}
    for kind, value, english, _ in _kinds():
        for name in english:
            names.setdefault(name, (kind, value))
    return names


@lru_cache(maxsize=1)
def _long_names() -> tuple[str, ...]:
    """Return the names that typing errors are corrected to."""
    kinds = ("thing", "colour", "size", "background", "place", "relation")
    return tuple(name for name, (kind, _) in _english_names().items() if kind in kinds and len(name) > 3)


@lru_cache(maxsize=1)
def _chinese_names() -> dict[str, tuple[str, Any]]:
    names: dict[str, tuple[str, Any]] = {}
    for kind, value, _, chinese in _kinds():
        for name in chinese:
            names.setdefault(name, (kind, value))
            if kind in ("colour", "size") and not name.endswith("的"):
                names.setdefault(name + "的", (kind, value))
    return names


@lru_cache(maxsize=1)
def _glyphs() -> dict[str, str]:
    """Return emoji character -> name."""
    return {glyph: name for name, glyph in EMOJI.items()}


# Parser: from tokens to a Wish


_INVERSE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above", "beside": "beside",
}  # fmt: skip


_SIDES = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}


class _Reader:
    """One-pass parser. pending: attributes of the next thing or text; last: the last thing or text."""

    def __init__(self, tokens: list[Token]):
        self.tokens = [token for token in tokens if token.kind != "ignored" or token.said in ("在", "位于")]
        self.wish = Wish()
        self.pending: dict[str, Any] = {}
        self.last: WishedThing | WishedText | None = None
        self.fresh = True  # no thing or text in this clause yet
        self.relation: str | None = None
        self.fronted: str | None = None  # 'below the star is a ring': a relation before both things
        self.ground: bool = False  # the next colours belong to the background
        self.colour: str | None = None  # 'white on black': default colour of all things
        self.negated = False

    def read(self) -> Wish:
        for at, token in enumerate(self.tokens):
            getattr(self, f"_{token.kind}")(at, token)
        if self.pending.get("colour") and not self.wish.ground_colours and not self.wish.things and not self.wish.texts:
            self.wish.ground_colours.append(self.pending["colour"])
        if self.relation and len(self.wish.things) >= 2 and self.wish.relation is None:
            self.wish.relation = self.relation
        for item in (*self.wish.things, *self.wish.texts):
            if item.colour is None and self._coloured(item):
                item.colour = self.colour
        self._take_unknown_hanzi()
        if self.wish.ground_colours and self.wish.ground is None:
            self.wish.ground = "flat"
        return self.wish

    def _take_unknown_hanzi(self) -> None:
        """'新年快乐，红色的字': unknown Chinese words are the text if the prompt mentions characters."""
        spoken = any(token.kind == "letters" for token in self.tokens)
        hanzi = [word for word in self.wish.unknown if _HANZI.fullmatch(word)]
        if spoken and len(hanzi) == 1 and not self.wish.texts:
            self.wish.unknown.remove(hanzi[0])
            self.wish.texts.append(WishedText(hanzi[0], self.pending.get("colour") or self.colour))

    def _next(self, at: int, *passed: str) -> str:
        """Return the kind of the next token, without the kinds in `passed`."""
        return next((t.kind for t in self.tokens[at + 1 :] if t.kind not in passed and t.kind != "ignored"), "end")

    def _ignored(self, at: int, token: Token) -> None: ...

    def _end(self, at: int, token: Token) -> None:
        self.fresh, self.negated = True, False
        if len(self.wish.ground_colours) >= (1 if self.wish.ground in (None, "flat") else 2):
            self.ground = False

    def _unknown(self, at: int, token: Token) -> None:
        if token.said not in self.wish.unknown and not self.negated:
            self.wish.unknown.append(token.said)

    def _negation(self, at: int, token: Token) -> None:
        self.negated = True

    def _number(self, at: int, token: Token) -> None:
        self.pending["number"] = token.value

    def _times(self, at: int, token: Token) -> None:
        """'star x3' or '3x star': a number."""
        if isinstance(self.last, WishedThing) and self._next(at) != "thing":
            self.last.number = token.value
        else:
            self.pending["number"] = token.value

    def _collective(self, at: int, token: Token) -> None:
        """'three shapes: ...': the number counts the list that follows, so it is ignored."""
        self.pending.pop("number", None)

    def _spelt(self, at: int, token: Token) -> None: ...

    def _colon(self, at: int, token: Token) -> None: ...

    def _its_side(self, at: int, token: Token) -> None:
        """'a cat with a dog to its left': the second thing is left of the first."""
        side = next((t.value for t in self.tokens[at + 1 :] if t.kind == "place"), "")
        if len(self.wish.things) == 2 and side in _SIDES:
            self.wish.relation = _INVERSE[_SIDES[side]]

    def _size(self, at: int, token: Token) -> None:
        attributive = self._next(at, "colour", "size", "number") in ("thing", "text", "letters")
        if isinstance(self.last, WishedThing) and self.last.size is None and not attributive and not self.pending:
            self.last.size = token.value
        else:
            self.pending["size"] = token.value

    def _on(self, at: int, token: Token) -> None:
        """'on white', 'against a blue background': the next colour is the background's. 'on the left' is a place."""
        after = [t.kind for t in self.tokens[at + 1 :] if t.kind not in ("number", "ignored", "size")]
        if after[:1] == ["colour"] and after[1:2] != ["thing"]:
            self.ground = True
            self.colour = self.pending.pop("colour", self.colour)

    def _background(self, at: int, token: Token) -> None:
        if "colour" in self.pending:
            self._paint(self.pending.pop("colour"))
        elif len(self.wish.ground_colours) < (1 if self.wish.ground in (None, "flat") else 2):
            self.ground = True
        self.pending.clear()
        self.fresh = False

    def _paper(self, at: int, token: Token) -> None:
        """'a red poster': the colour is the background's."""
        if "colour" in self.pending and not self.wish.ground_colours:
            self._paint(self.pending.pop("colour"))

    def _pronoun(self, at: int, token: Token) -> None:
        """'a star above it': the relation goes from the second thing to the first."""
        if self.relation and len(self.wish.things) == 2:
            self.wish.relation = _INVERSE[self.relation]

    def _gradient(self, at: int, token: Token) -> None:
        self.wish.ground, self.ground = "gradient", True
        if "colour" in self.pending:
            self._paint(self.pending.pop("colour"))

    def _split(self, at: int, token: Token) -> None:
        self.wish.ground, self.ground = "split", True

    def _across(self, at: int, token: Token) -> None:
        self.wish.across = True

    def _colour(self, at: int, token: Token) -> None:
        if self.negated:
            self.wish.without.add(token.value)
        elif self.ground:
            self._paint(token.value)
        elif self._next(at, "size", "number") in ("thing", "background", "paper", "letters", "text", "gradient"):
            self.pending["colour"] = token.value
        elif self.last is not None and self.last.colour is None and self._coloured(self.last):
            self.last.colour = token.value
        else:
            self.pending["colour"] = token.value

    def _coloured(self, item: WishedThing | WishedText) -> bool:
        return isinstance(item, WishedText) or item.name in SHAPES

    def _paint(self, colour: str) -> None:
        wanted = 1 if self.wish.ground in (None, "flat") else 2
        if len(self.wish.ground_colours) < wanted:
            self.wish.ground_colours.append(colour)
        if len(self.wish.ground_colours) == wanted and wanted == 1:
            self.ground = False

    def _place(self, at: int, token: Token) -> None:
        if self.ground and self.wish.ground in ("gradient", "split"):
            self.wish.across = token.value in ("left", "right")
            if len(self.wish.ground_colours) == 2:
                self.ground = False
        elif self._is_relation(at, token):
            self.relation = _SIDES[token.value]
            self._relate()
        elif at and self.tokens[at - 1].kind == "its_side":
            return
        elif self._leads(at, token):
            self.fronted = _SIDES[token.value]
        elif self.last is not None and (not self.fresh or self._next(at) == "end") and not self.pending:
            self._put(self.last, token.value)
        else:
            self.pending["place"] = token.value

    def _is_relation(self, at: int, token: Token) -> bool:
        """Return whether a place is a relation: 圆形在方块的左边 has two things, 在 between them, and then a side."""
        clause: list[Token] = []
        for before in self.tokens[:at]:
            clause = [] if before.kind == "end" else [*clause, before]
        at_words = ("在", "位于")
        kinds = ["at" if t.said in at_words else t.kind for t in clause if t.kind == "thing" or t.said in at_words]
        both = kinds[-3:] == ["thing", "at", "thing"] or (kinds == ["at", "thing"] and len(self.wish.things) == 2)
        return both and token.value in _SIDES

    def _leads(self, at: int, token: Token) -> bool:
        """Return whether a place is a relation of the last thing to the next: 三角形右侧有一个菱形."""
        follows = self._next(at, "number", "size", "colour") == "thing"
        chinese = _HANZI.match(token.said) is not None
        return chinese and follows and token.value in _SIDES and at > 0 and self.tokens[at - 1].kind == "thing"

    def _relation(self, at: int, token: Token) -> None:
        chinese = _HANZI.match(token.said) is not None
        if self.last is not None and isinstance(self.last, WishedThing):
            self.relation = token.value
            if chinese:
                self._relate()
        elif not self.wish.things:
            self.fronted = token.value

    def _relate(self) -> None:
        if len(self.wish.things) == 2 and self.wish.relation is None:
            self.wish.relation = self.relation

    def _letters(self, at: int, token: Token) -> None:
        """'in red letters', 'blue text': the colour belongs to the text."""
        colour = self.pending.pop("colour", None)
        if colour and self.wish.texts and self._next(at) != "text":
            self.wish.texts[-1].colour = colour
        elif colour:
            self.pending["colour"] = colour

    def _text(self, at: int, token: Token) -> None:
        place = self.pending.get("place")
        self.last = WishedText(token.value, self.pending.get("colour"))
        if place:
            self._put(self.last, place)
        self.wish.texts.append(self.last)
        self.pending, self.fresh = {}, False

    def _thing(self, at: int, token: Token) -> None:
        if self.negated:
            self.wish.without.add(token.value)
            self.pending = {}
            return
        if token.said.lower() == "plus" and self.last is not None and not self.pending:
            return  # 'a star plus a ring': "plus" is not a cross here
        again = at > 0 and self.tokens[at - 1].kind == "thing"
        known = isinstance(self.last, WishedThing) and self.last.name == token.value
        if again and known and not self.pending and token.said not in _glyphs():
            return  # 'a crescent moon' is one thing
        given = dict(self.pending)
        if token.value not in SHAPES:
            given.pop("colour", None)
        self.last = WishedThing(token.value, **given)
        self.wish.things.append(self.last)
        self.pending, self.fresh = {}, False
        if len(self.wish.things) == 2 and self.wish.relation is None:
            self.wish.relation = _INVERSE[self.fronted] if self.fronted else self.relation

    def _put(self, item: WishedThing | WishedText, place: str) -> None:
        if isinstance(item, WishedThing):
            item.place = place
        else:
            item.place = {"center": "middle"}.get(place, place.split()[0])
            item.place = item.place if item.place in ("top", "middle", "bottom") else "middle"


assert all(place in PLACES for place in _table()["places"]) and set(_table()["sizes"]) == set(SIDES)  # noqa: PT018
