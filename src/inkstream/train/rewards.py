"""What rewards get, and how recipes name them. The rewards are functions that the caller of `train` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from inkstream.train.pictures import Source
from inkstream.types import InputError


@dataclass(frozen=True)
class Asked:
    """What a picture was drawn for: a caption of a picture of the training data."""

    prompt: str
    index: int  # of the picture in `source`
    source: Source


Reward = Callable[[Sequence[Image.Image], Sequence[Asked]], Mapping[str, Sequence[float]]]
"""Values pictures, each in [0, 1], by the name of each reward."""


def weights_of(rewards: Sequence[str]) -> dict[str, float]:
    """Return the weight of each reward by its name. Raises InputError for a weight that is no number above 0."""
    found: dict[str, float] = {}
    for text in rewards:
        name, _, weight = text.rpartition(":")
        try:
            found[name] = float(weight)
        except ValueError:
            name, found[text] = text, 1.0
        if not name or not found[name] > 0:
            raise InputError(f"[reinforce] rewards: {text!r} is no reward: write a name, or name:weight as in text:2")
    if not found:
        raise InputError("[reinforce] rewards is empty: name one, such as right")
    return found
