"""A second text reader, independent of inkstream's: rapidocr, from the extra `ocr`. It is for reports, not rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from inkstream.engine.pictures.ocr import distance, fold, lines_in


@dataclass(frozen=True)
class Reading:
    """The lines read, and their match with the wanted text, without case, spaces and look-alikes such as 0 and O."""

    lines: tuple[str, ...]
    exact: bool
    ned: float  # 1 - edit distance / longer length; mean over the lines, weighted by length


def read(picture: Image.Image, wanted: str) -> Reading:
    """Read a picture and compare it with the wanted lines, separated by "\\n". Raises InputError without the extra."""
    return compare([line.text for line in lines_in(picture)], wanted.split("\n"))


def compare(lines: Sequence[str], wanted: Sequence[str]) -> Reading:
    """Compare the lines read with the wanted ones. Each wanted line is compared with its nearest line, or all lines."""
    found = [*map(fold, lines), fold("".join(lines))]
    right, total, exact = 0.0, 0, True
    for line in map(fold, wanted):
        likeness = max(1 - distance(line, other) / max(len(line), len(other), 1) for other in found)
        right, total = right + likeness * len(line), total + len(line)
        exact = exact and line in found
    return Reading(tuple(lines), exact, right / max(total, 1))
