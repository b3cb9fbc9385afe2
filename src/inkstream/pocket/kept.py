"""Words of a prompt that Pocket's grammar does not know stay in the prompt that it writes: an adapter may know them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from inkstream.pocket.vocabulary import EMOJI, plural, with_article
from inkstream.pocket.wishes import Token, tokens_of

STAND_INS = ("robot", "teddy", "hat", "key", "rocket", "drum", "camera", "bell")
"""Emoji that take the places of unknown things while the grammar works. Those that the prompt names are left out."""


@dataclass(frozen=True)
class Kept:
    """A prompt without its unknown words. prompt: stand-ins take their places. names: stand-in -> the unknown words.

    ends: clauses of unknown words alone, which go to the end of the prompt that is written.
    """

    prompt: str
    names: Mapping[str, str]
    ends: Sequence[str] = ()

    def put_back(self, caption: str) -> str:
        """Return a caption with the unknown words in the places of their stand-ins."""
        for stand_in, name in self.names.items():
            for old, new in ((with_article(stand_in), with_article(name)), (plural(stand_in), plural(name))):
                caption = re.sub(
                    rf"\b{old}\b", lambda found, new=new: _like(found[0], new), caption, flags=re.IGNORECASE
                )
            caption = re.sub(rf"\b{stand_in}\b", lambda found, name=name: name, caption, flags=re.IGNORECASE)
        return ", ".join([caption, *self.ends])


def keep_unknown(prompt: str, words: Collection[str] | None = None) -> Kept:
    """Find the unknown words of a prompt. words: keep only these, and their plurals; None: keep all.

    A clause of unknown words alone is kept as it is, unless it is the first one. Elsewhere, unknown words in a row are
    the name of a thing, with the known thing directly behind them if there is one: `sks dog`.
    """
    tokens = [token if _is_kept(token, words) else token._replace(kind="ignored") for token in tokens_of(prompt)]
    named = {token.value for token in tokens if token.kind == "thing"}
    free = [name for name in STAND_INS if name in EMOJI and name not in named]
    names: dict[str, str] = {}
    ends: list[str] = []
    written, at = "", 0
    for number, clause in enumerate(_clauses(tokens)):
        start = prompt.find(clause[0].said, at)
        known = [token for token in clause if token.kind not in ("unknown", "ignored", "end")]
        if number and not known and any(token.kind == "unknown" for token in clause):
            stop = start
            for token in clause:
                stop = prompt.find(token.said, stop) + len(token.said)
            words = prompt[start:stop]
            ends.append(words.removesuffix(clause[-1].said).strip() if clause[-1].kind == "end" else words)
            written, at = written + prompt[at:start], stop
            continue
        for name, said in _names(clause):
            start = prompt.find(said[0].said, at)
            stop = start
            for token in said:
                stop = prompt.find(token.said, stop) + len(token.said)
            stand_in = next((own for own, known_name in names.items() if known_name == name), None)
            if stand_in is None and free:
                stand_in = free.pop(0)
                names[stand_in] = name
            written, at = written + prompt[at:start] + (stand_in or prompt[start:stop]), stop
        end = at
        for token in clause:
            found = prompt.find(token.said, end)
            end = end if found < 0 else found + len(token.said)
        written, at = written + prompt[at:end], end
    return Kept(written + prompt[at:], names, ends)


def _is_kept(token: Token, words: Collection[str] | None) -> bool:
    """Whether a token is known anyway, or is one of the words."""
    said = token.said.casefold()
    return token.kind != "unknown" or words is None or said in words or said.removesuffix("s") in words


def _clauses(tokens: Sequence[Token]) -> list[list[Token]]:
    """Return the tokens of each clause. The mark at its end belongs to it."""
    clauses: list[list[Token]] = [[]]
    for token in tokens:
        clauses[-1].append(token)
        if token.kind == "end":
            clauses.append([])
    return [clause for clause in clauses if clause]


def _names(clause: Sequence[Token]) -> list[tuple[str, list[Token]]]:
    """Return the unknown things of a clause: their names in the singular, and their tokens."""
    found: list[tuple[str, list[Token]]] = []
    run: list[Token] = []
    many = False  # the number before the run is above one
    for token in (*clause, Token("end", "", "")):
        if token.kind == "unknown":
            run.append(token)
            continue
        if run:
            own = [*run, token] if token.kind == "thing" else run
            name = " ".join(word.said for word in own)
            name = name.removesuffix("s") if many else name
            if len(name) > 1:  # a single letter is no name
                found.append((name, own))
            run = []
        many = token.kind in ("number", "times") and token.value > 1
    return found


def _like(old: str, new: str) -> str:
    """Return new words with a capital if the old ones have one."""
    return new[:1].upper() + new[1:] if old[:1].isupper() else new
