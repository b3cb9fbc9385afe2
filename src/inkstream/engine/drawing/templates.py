"""Prompts as templates, written out by the seed: `{red|blue}` and `__file__`, as in Dynamic Prompts. No torch.

A template is written out before anything else looks at the prompt. The picture's request has the written-out prompt,
which is no template any more, so it draws the same picture wherever the files of wildcards are.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from inkstream.types import InputError, Machine, Region, Request, Wish

BRACES = re.compile(r"\{([^{}]*)\}")
"""The innermost braces."""
WILDCARD = re.compile(r"__([^\W_](?:[\w .-]|/(?!/)){0,100}?)__(?!_)")
NUMBER = re.compile(r"\s*(?:(\d{1,3})(?:-(\d{1,3}))?|-(\d{1,3}))\$\$(?:([^|$]*)\$\$)?")
"""The number of choices to take: 2$$, 1-3$$, -3$$; and what joins them, as in 2$$ and $$."""
WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})::")
JSON = re.compile(r'\s*\{\s*"')
MOST_PARTS = 1000
"""A template with more parts is refused: a file may name itself."""
MOST_CHARACTERS = 100_000
MOST_BYTES = 16 * 1024 * 1024
"""A larger file of wildcards is refused."""

Files = Callable[[str], list[str]]
"""The name of a wildcard -> its lines."""


def wildcard_folder(machine: Machine) -> Path:
    """Return the folder of the files of wildcards. It need not exist."""
    if machine.wildcards is not None:
        return Path(machine.wildcards).expanduser()
    from platformdirs import user_data_path

    return user_data_path("inkstream") / "wildcards"


def is_template(prompt: str) -> bool:
    """Whether a prompt has something to write out. JSON has not, and neither have braces without a choice in them."""
    return not JSON.match(prompt) and (WILDCARD.search(prompt) is not None or _choices_in(prompt) is not None)


def has_template(request: Request) -> bool:
    """Whether a request's prompt, its negative prompt or the text of a region is a template."""
    regions = (Region.read(region).text for region in request.regions)
    return any(map(is_template, (request.prompt, request.negative_prompt, *regions)))


def filled(request: Wish, folder: Path) -> Wish:
    """The request of one picture, with its prompts written out by its seed.

    Raises InputError for a wildcard without a file, or a template that has no end.
    """
    chooser = random.Random(request.seed or 0)  # only its `random` is used: its results stay the same over versions
    files = lru_cache(maxsize=None)(partial(_lines, folder))
    update: dict[str, Any] = {
        name: fill(getattr(request, name), files, chooser) for name in ("prompt", "negative_prompt")
    }
    regions = map(Region.read, request.regions)
    update["regions"] = tuple(str(one._replace(text=fill(one.text, files, chooser))) for one in regions)
    return request.model_copy(update={name: text for name, text in update.items() if text != getattr(request, name)})


def fill(prompt: str, files: Files, chooser: random.Random) -> str:
    """Write a prompt out, until nothing is left to write out."""
    if JSON.match(prompt):
        return prompt
    for _ in range(MOST_PARTS):
        if (found := _choices_in(prompt)) is not None:
            written = _chosen(found[1], files, chooser)
        elif (found := WILDCARD.search(prompt)) is not None:
            written = _choose(files(found[1]), chooser)
        else:
            return prompt
        prompt = prompt[: found.start()] + written + prompt[found.end() :]
        if len(prompt) > MOST_CHARACTERS:
            break
    raise InputError(
        f"the prompt's wildcards do not end within {MOST_PARTS} parts and {MOST_CHARACTERS} characters: "
        "look for a file of wildcards that names itself"
    )


def _choices_in(prompt: str) -> re.Match[str] | None:
    """The first braces with choices in them."""
    return next((found for found in BRACES.finditer(prompt) if "|" in found[1] or NUMBER.match(found[1])), None)


def _chosen(text: str, files: Files, chooser: random.Random) -> str:
    """One of the choices in braces, or as many as the number before them says, without repetition."""
    number = NUMBER.match(text)
    if number is None:
        return _choose(text.split("|"), chooser)
    choices: list[str] = []
    for choice in text[number.end() :].split("|"):  # the lines of a wildcard alone are choices too
        wildcard = WILDCARD.fullmatch(choice.strip())
        choices += files(wildcard[1]) if wildcard else [choice]
    least = int(number[1] or 0)
    most = int(number[2] or number[3] or least)
    least, most = sorted((min(least, len(choices)), min(most, len(choices))))
    taken: list[str] = []
    for _ in range(least + int(chooser.random() * (most - least + 1))):
        taken.append(choices.pop(_choose_index(choices, chooser)))
    return (", " if number[4] is None else number[4]).join(_unweighted(choice).strip() for choice in taken)


def _choose(choices: Sequence[str], chooser: random.Random) -> str:
    return _unweighted(choices[_choose_index(choices, chooser)])


def _choose_index(choices: Sequence[str], chooser: random.Random) -> int:
    """The index of a choice. `0.7::red` has the weight 0.7, others have 1."""
    weights = [float(found[1]) if (found := WEIGHT.match(choice)) else 1.0 for choice in choices]
    left = chooser.random() * sum(weights)
    for index, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return index
    return max(range(len(weights)), key=weights.__getitem__)  # all weights are 0, or rounding


def _unweighted(choice: str) -> str:
    return choice[found.end() :] if (found := WEIGHT.match(choice)) else choice


def _lines(folder: Path, name: str) -> list[str]:
    """The lines of a file of wildcards, without empty ones and comments. A name leads nowhere outside the folder.

    Errors do not tell the folder's path, which a client of a server need not know.
    """
    path = folder / f"{name.strip()}.txt"
    if ".." in path.relative_to(folder).parts or not path.is_file():
        near = difflib.get_close_matches(name, names_in(folder), n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"put {name}.txt into the folder of --wildcards"
        raise InputError(f"wildcard __{name}__ is not known: {hint}")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"wildcard __{name}__ has more than {MOST_BYTES >> 20} MiB: make its file smaller")
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except OSError as error:
        raise InputError(f"wildcard __{name}__ cannot be read ({error.strerror}): check its file") from None
    except UnicodeDecodeError:
        raise InputError(f"wildcard __{name}__ is not UTF-8 text: save its file as UTF-8") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"wildcard __{name}__ has no lines: write one choice a line into its file")
    return lines


def names_in(folder: Path) -> list[str]:
    """Return the names of wildcards in a folder and the folders inside: paths without a suffix."""
    files = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    return [file.relative_to(folder).with_suffix("").as_posix() for file in files]
