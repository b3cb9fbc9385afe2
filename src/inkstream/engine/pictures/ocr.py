"""Words in a picture and their places, found by rapidocr, from the extra `ocr`."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from inkstream.types import InputError

LEAST = 512  # pixels of the shorter side; smaller pictures are enlarged, because rapidocr is made for photographs
ALIKE = str.maketrans({"0": "o", "1": "l", "i": "l", "|": "l"})

Corners = tuple[tuple[float, float], ...]
"""The four corners (x, y) of a box, in pixels of the picture."""


class Line(NamedTuple):
    """A line of text, its box, and its words with theirs. A Chinese character is a word."""

    text: str
    corners: Corners
    words: tuple[tuple[str, Corners], ...]


def lines_in(picture: Image.Image) -> list[Line]:
    """Return the lines that rapidocr finds, in its order. Raises InputError without the extra."""
    scale = max(1.0, LEAST / min(picture.size))
    size = round(picture.width * scale), round(picture.height * scale)
    pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    found = open_reader()(np.ascontiguousarray(pixels[..., ::-1]), return_word_box=True)  # rapidocr takes BGR

    def corners(box: Any) -> Corners:
        return tuple((float(x) / scale, float(y) / scale) for x, y in box)

    if found.boxes is None:
        return []
    return [
        Line(text, corners(box), tuple((word, corners(own)) for word, _, own in words if own is not None))
        for text, box, words in zip(found.txts, found.boxes, found.word_results)
    ]


def boxes_of(lines: list[Line], wanted: str) -> list[Corners]:
    """Return the boxes of the words that hold a text, wherever it is written; of all lines if the text is empty.

    Case, spaces and look-alikes such as 0 and O do not count.
    """
    wanted = fold(wanted)
    if not wanted:
        return [line.corners for line in lines]
    found: list[Corners] = []
    for line in lines:
        owners = [index for index, (word, _) in enumerate(line.words) for _ in fold(word)]
        letters = "".join(fold(word) for word, _ in line.words)
        at, within = letters.find(wanted), set[int]()
        while at >= 0:
            within |= set(owners[at : at + len(wanted)])
            at = letters.find(wanted, at + 1)
        found += [corners for index, (_, corners) in enumerate(line.words) if index in within]
    return found


def fold(text: str) -> str:
    """Normalise a text: no case, no spaces, look-alikes are equal."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split()).translate(ALIKE)


def distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@lru_cache(maxsize=1)
def open_reader() -> Any:
    """Load rapidocr with its models, once. Raises InputError if the extra is not installed."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise InputError(f"reading text needs rapidocr ({error}): pip install 'inkstream[ocr]'") from error
    return RapidOCR(params={"Global.log_level": "error"})
