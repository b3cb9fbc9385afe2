"""The vocabulary of scenes in English and Chinese: shapes, colours, emoji and words to write."""

from __future__ import annotations

import tomllib
from pathlib import Path

_TABLE = tomllib.loads((Path(__file__).parent / "vocabulary.toml").read_text("utf-8"))

SHAPES: dict[str, str] = _TABLE["shapes"]
"""English name -> Chinese name, in the order of a curriculum."""

CHINESE_COLOURS: dict[str, str] = _TABLE["colours"]

EMOJI: dict[str, str] = {name: glyph for name, (glyph, _) in _TABLE["emoji"].items()}
"""English name -> the single code point that Noto Color Emoji draws."""

CHINESE_EMOJI: dict[str, str] = {name: chinese for name, (_, chinese) in _TABLE["emoji"].items()}

MEASURES: dict[str, str] = {name: word for word, names in _TABLE["measures"].items() for name in names.split()}
"""Name -> its Chinese measure word, if that is not 个."""

HIDING: dict[str, frozenset[str]] = {colour: frozenset(names.split()) for colour, names in _TABLE["hiding"].items()}
"""Background colour -> emoji that are hard to see on it."""

ENGLISH: tuple[str, ...] = tuple(word.replace("_", " ") for word in _TABLE["written"]["english"].split())
"""Words and phrases for posters, in capitals."""

CHINESE: tuple[str, ...] = tuple(_TABLE["written"]["chinese"].split())
"""Words of one to four characters for posters."""

HANZI: tuple[str, ...] = tuple(dict.fromkeys("".join(_TABLE["written"]["hanzi_first"].split()) + "".join(CHINESE)))
"""All Chinese characters that scenes write, simplest first."""

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?.,:'&%+-#$"
"""All other glyphs that scenes write."""

FACES: dict[str, str] = _TABLE["faces"]
"""Font faces, with Chinese names. mono has no Chinese characters."""

HANZI_FACES = ("sans", "bold", "serif")


def plural(name: str) -> str:
    """Return the plural: 'circles', 'crosses', 'butterflies', 'mice'."""
    if name in _TABLE["plurals"]:
        return _TABLE["plurals"][name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def with_article(name: str) -> str:
    """Return the name with its article: 'a circle', 'an arrow', 'grapes'."""
    if name in _TABLE["singulars"]:
        return _TABLE["singulars"][name]
    return f"{'an' if name[0] in 'aeiou' and not name.startswith('uni') else 'a'} {name}"
