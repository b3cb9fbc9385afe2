"""Rewards for reinforcement learning, by name: inkstream's graders, the second reader, functions and servers."""

from __future__ import annotations

import base64
import importlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from inkstream.engine.pictures.asked import asked_in
from inkstream.evaluate.grades import Marks, grade
from inkstream.evaluate.ocr import read
from inkstream.evaluate.report import QUESTIONS
from inkstream.train.pictures import Scenes
from inkstream.train.rewards import Asked, Reward
from inkstream.types import InputError

One = Callable[[Image.Image, Asked], float]
PATIENCE = 120.0
"""Seconds that a server has to value the pictures of a step."""


def rewards_of(names: Sequence[str]) -> Reward:
    """Return the function that values pictures by these rewards. Raises InputError for an unknown one.

    Names: a key of GRADERS, `ocr`, `module:NAME`, or the URL of a server.
    """
    found = {name: _reward(name) for name in names}

    def value(pictures: Sequence[Image.Image], asked: Sequence[Asked]) -> Mapping[str, Sequence[float]]:
        return {name: of(pictures, asked) for name, of in found.items()}

    return value


def _reward(name: str) -> Callable[[Sequence[Image.Image], Sequence[Asked]], list[float]]:
    if urlsplit(name).scheme in ("http", "https"):
        return lambda pictures, asked: ask_server(name, pictures, asked)
    one: One
    if name in GRADERS:
        question = GRADERS[name]
        one = lambda picture, asked: question(marks_of(picture, asked))  # noqa: E731
    elif name == "ocr":
        one = read_again
    elif ":" in name:
        function = function_named(name)
        one = lambda picture, asked: float(function(picture, asked.prompt))  # noqa: E731
    else:
        known = ", ".join([*GRADERS, "ocr"])
        raise InputError(f"[reinforce] rewards: {name!r} is not known: take {known}, module:NAME, or a URL")
    return lambda pictures, asked: [one(picture, each) for picture, each in zip(pictures, asked, strict=True)]


# Graders ------------------------------------------------------------------------------------------------------------


def marks_of(picture: Image.Image, asked: Asked) -> Marks:
    """Grade a picture against the scene that its prompt describes in full."""
    if not isinstance(asked.source, Scenes):
        raise InputError("[reinforce] rewards: graders know scenes alone: set [data] source = scenes, or take ocr")
    return grade(picture, asked.source.scene(asked.index))


def all_of(marks: Marks) -> float:
    """Return the mean of all that was graded."""
    answers = [getattr(marks, name) for name in QUESTIONS]
    graded = [float(answer) for answer in answers if answer is not None]
    return sum(graded) / len(graded) if graded else 1.0


def _mark(*names: str) -> Callable[[Marks], float]:
    """Return the mean of some marks; 1 if the scene has none of them: then it says nothing."""

    def value(marks: Marks) -> float:
        graded = [float(answer) for name in names if (answer := getattr(marks, name)) is not None]
        return sum(graded) / len(graded) if graded else 1.0

    return value


GRADERS: dict[str, Callable[[Marks], float]] = {
    "right": all_of,
    "text": _mark("text_exact", "ned"),
    "relation": _mark("relation"),
    "count": _mark("count"),
    "colour": _mark("colours", "background"),
}
"""Name of a reward -> its value in [0, 1], from the marks of a picture."""


# Others -------------------------------------------------------------------------------------------------------------


def read_again(picture: Image.Image, asked: Asked) -> float:
    """Return how near the text that the second reader reads is to the texts in quotation marks; 1 without any."""
    texts = asked_in(asked.prompt).texts
    return read(picture, "\n".join(texts)).ned if texts else 1.0


def function_named(name: str) -> Callable[[Image.Image, str], float]:
    """Import `module:NAME`: a function of a picture and its prompt that returns a number in [0, 1]."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"[reinforce] rewards: {name} cannot be imported ({error}): write module:NAME") from error
    if not callable(found):
        raise InputError(f"[reinforce] rewards: {name} is no function: name one of (picture, prompt)")
    return found  # type: ignore[return-value]


def ask_server(url: str, pictures: Sequence[Image.Image], asked: Sequence[Asked]) -> list[float]:
    """POST {"pictures": [PNG in base64], "prompts": [...]} to a server, which answers {"rewards": [...]}."""
    encoded = []
    for picture in pictures:
        picture.save(file := io.BytesIO(), "PNG")
        encoded.append(base64.b64encode(file.getvalue()).decode())
    body = json.dumps({"pictures": encoded, "prompts": [each.prompt for each in asked]}).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=PATIENCE) as answer:
            rewards = [float(value) for value in json.load(answer)["rewards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error) or type(error).__name__
        raise InputError(f'{url} gave no rewards ({why}): it must answer {{"rewards": [...]}}') from error
    if len(rewards) != len(pictures):
        raise InputError(f"{url} gave {len(rewards)} rewards for {len(pictures)} pictures: it must give one for each")
    return rewards
