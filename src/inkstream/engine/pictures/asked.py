"""What a prompt asks for that can be checked: quoted texts and hex colours. No torch, no numpy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from inkstream.types import InputError

QUOTED = re.compile(
    r"\"([^\"\n]+)\"|“([^”\n]+)”|「([^」\n]+)」|『([^』\n]+)』|(?<!\w)'([^'\n]+)'(?!\w)|(?<!\w)‘([^’\n]+)’(?!\w)"
)
HEX = re.compile(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})(?![0-9a-zA-Z])")


@dataclass(frozen=True)
class Asked:
    """What a picture must show. texts: without line ends; colours: like #ff8000, in lower case."""

    texts: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.texts or self.colours)


def asked_in(*prompts: str) -> Asked:
    """Return the quoted texts and the hex colours of prompts. Of a JSON prompt, those in all its values."""
    words = "\n".join(value for prompt in prompts for value in _values(prompt))
    texts = (" ".join(next(filter(None, found.groups())).split()) for found in QUOTED.finditer(words))
    return Asked(_once(text for text in texts if text.strip()), _once(map(read_colour, HEX.findall(words))))


def read_colour(text: str) -> str:
    """Return a colour such as #f80 as #ff8800. Raises InputError for another text."""
    digits = text.strip().removeprefix("#").lower()
    if not re.fullmatch(r"[0-9a-f]{3}|[0-9a-f]{6}", digits):
        raise InputError(f"colour {text[:40]!r} is not a hex code: write it like #ff8000 or #f80")
    return f"#{digits if len(digits) == 6 else ''.join(2 * digit for digit in digits)}"


def _values(prompt: str) -> Iterator[str]:
    """The texts of a JSON prompt's values; the prompt itself if it is not JSON."""
    try:
        pending: list[Any] = [json.loads(prompt)] if prompt.lstrip().startswith("{") else [prompt]
    except (ValueError, RecursionError):
        pending = [prompt]
    while pending:
        value = pending.pop(0)
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending = [*cast("dict[str, Any]", value).values(), *pending]
        elif isinstance(value, list):
            pending = [*cast("list[Any]", value), *pending]


def _once(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
