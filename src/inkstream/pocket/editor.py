"""The prompt writer of a Pocket that edits: it reads an instruction as people type it, and writes it as it was taught.

It sees the words alone, not the picture. It has the role of the prompt enhancers of edit models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from inkstream.pocket.edits import EditKind, plain
from inkstream.pocket.wishes import Token, tokens_of
from inkstream.pocket.writer import Written

KNOWN = 'pocket-edit knows edits such as "make the circle blue", "remove the star", "add a red heart at the top left"'

_VERBS: dict[EditKind, str] = {
    "remove": r"\b(?:remove|delete|erase|take (?:\w+ )*?(?:away|out|off)|get rid of|clear|lose|hide|don'?t want|"
    r"do without|drop the|cut out|wipe)\b|去掉|删|移除|去除|擦|拿掉|拿走|不要|消失",
    "replace": r"\b(?:replace|swap|exchange|substitute|instead of|into|becomes?|trade|switch)\b|"
    r"换|替|代替|变成一|改成一",
    "move": r"\b(?:move|shift|slide|drag|push|bring|relocate|send|nudge)\b|移|挪|搬",
    "add": r"\b(?:add|insert|include|draw|give|place an?|put an?|want an?|another|there should be an?)\b|"
    r"加|添|画|增|放一",
}
"""Words that say which kind of edit is meant, the first match first."""
_REVERSED = re.compile(r"\binstead of\b|\bin place of\b|用.+[换替代]")
"""Instructions that name the new thing before the old one."""


@dataclass(frozen=True)
class Named:
    """A thing in an instruction, with the words around it."""

    name: str
    colour: str
    size: str
    new: bool  # "a star", not "the star"


def write(instruction: str, seed: int = 0, negative: str = "", keep: bool = False) -> Written:
    """Write an instruction as training words it. What is not understood stays as it was typed, with a note."""
    found = read_edit(instruction)
    if found is None:
        return Written(instruction, None, (f"{KNOWN}; this one stays as typed",))
    return Written(plain(*found), None)


def read_edit(text: str) -> tuple[EditKind, dict[str, str]] | None:
    """Return the kind of edit that an instruction asks for and its words, as in `edits.Edit`; None if it is unclear."""
    lowered = re.sub(r"['’]", "'", text.lower())
    tokens = _tokens(text)
    texts = _values(tokens, "text")
    if texts:
        return "rewrite", {"text": texts[-1], "old": texts[0] if len(texts) > 1 else ""}
    said = next((kind for kind, pattern in _VERBS.items() if re.search(pattern, lowered)), None)
    things, places, colours = _things(tokens), _values(tokens, "place"), _values(tokens, "colour")
    if said != "add" and (about := _ground_or_text(tokens)) and colours and not things:
        return "recolour", {"target": about, "colour": colours[-1]}
    if not things:
        return None
    first, last = things[0], things[-1]
    old = {"target": first.name, "target colour": first.colour}
    if said == "remove":
        return "remove", old
    if len(things) > 1 or (said == "replace" and first.new):
        old_thing, new = (last, first) if _REVERSED.search(lowered) else (first, last)
        words = {"target": old_thing.name, "target colour": old_thing.colour}
        return "replace", {**words, "name": new.name, "colour": new.colour}
    if said == "add" or (first.new and said != "move"):
        return "add", {"name": first.name, "colour": first.colour, "size": first.size, "place": _first(places)}
    if places:
        return "move", {**old, "place": places[-1]}
    if len(colours) > 1:
        return "recolour", {"target": first.name, "target colour": colours[0], "colour": colours[-1]}
    if colours:
        return "recolour", {"target": first.name, "colour": colours[0]}
    return None


def _without_verbs(text: str) -> str:
    """Return an instruction without verbs that the lexer would take for misspelt things, as "shift" for "shirt"."""
    verbs = re.compile(rf"\b(?:do not|don['’]?t)\b|{_VERBS['move']}", re.IGNORECASE)
    pieces = re.split(r"(\"[^\"]*\"|“[^”]*”)", text)  # quoted text is at the odd places
    return "".join(piece if i % 2 else verbs.sub("", piece) for i, piece in enumerate(pieces))


def _tokens(text: str) -> list[Token]:
    """Return the tokens of an instruction that mean something. "the text pink" is about the text, not the word pink."""
    found: list[Token] = []
    for token in tokens_of(_without_verbs(text)):
        if token.kind == "text" and not _is_given(token):
            found += [Token("letters", "letters", "the text"), *tokens_of(token.value)]
        else:
            found.append(token)
    return [token for token in found if token.kind != "ignored"]


def _things(tokens: Sequence[Token]) -> list[Named]:
    """Return the things that are named, with the colour and the size directly before each."""
    found = []
    for at, token in enumerate(tokens):
        if token.kind != "thing":
            continue
        before: dict[str, str] = {}
        i = at - 1
        while i >= 0 and tokens[i].kind in ("colour", "size", "number"):
            before.setdefault(tokens[i].kind, str(tokens[i].value))
            i -= 1
        size = before.get("size", "")
        found.append(Named(token.value, before.get("colour", ""), size if size != "medium" else "", "number" in before))
    return found


def _values(tokens: Sequence[Token], kind: str) -> list[str]:
    return [token.value for token in tokens if token.kind == kind]


def _first(values: Sequence[str]) -> str:
    return values[0] if values else ""


def _ground_or_text(tokens: Sequence[Token]) -> str:
    kinds = {token.kind for token in tokens}
    return "background" if "background" in kinds else "text" if "letters" in kinds else ""


def _is_given(token: Token) -> bool:
    """Return whether a text is in quotes, in capitals or in Hanzi: "the text should be blue" has none."""
    named = (f"the {word} {token.value}" for word in ("text", "word"))
    return token.value.upper() == token.value or token.said.lower() not in named
