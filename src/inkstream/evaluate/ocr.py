"""A second text reader, independent of inkstream's: rapidocr, from the extra `ocr`. It is for reports, not rewards."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from inkstream.types import InputError

LEAST = 512  # pixels of the shorter side; smaller pictures are enlarged, because rapidocr is made for photographs
ALIKE = str.maketrans({"0": "o", "1": "l", "i": "l", "|": "l"})


@dataclass(frozen=True)
class Reading:
    """The lines read, and their match with the wanted text, without case, spaces and look-alikes such as 0 and O."""

    lines: tuple[str, ...]
    exact: bool
    ned: float  # 1 - edit distance / longer length; mean over the lines, weighted by length


def read(picture: Image.Image, wanted: str) -> Reading:
    """Read a picture and compare it with the wanted lines, separated by "\\n". Raises InputError without the extra."""
    return compare(lines_of(picture), wanted.split("\n"))


def lines_of(picture: Image.Image) -> tuple[str, ...]:
    """Return the lines that rapidocr finds, in its order."""
    scale = max(1.0, LEAST / min(picture.size))
    size = round(picture.width * scale), round(picture.height * scale)
    pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    return tuple(open_reader()(np.ascontiguousarray(pixels[..., ::-1])).txts or ())  # rapidocr takes BGR


def compare(lines: Sequence[str], wanted: Sequence[str]) -> Reading:
    """Compare the lines read with the wanted ones. Each wanted line is compared with its nearest line, or all lines."""
    found = [*map(fold, lines), fold("".join(lines))]
    right, total, exact = 0.0, 0, True
    for line in map(fold, wanted):
        likeness = max(1 - distance(line, other) / max(len(line), len(other), 1) for other in found)
        right, total = right + likeness * len(line), total + len(line)
        exact = exact and line in found
    return Reading(tuple(lines), exact, right / max(total, 1))


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
        raise InputError(f"the second reader needs rapidocr ({error}): pip install 'inkstream[ocr]'") from error
    return RapidOCR(params={"Global.log_level": "error"})
