"""Reports of judged pictures: shares with confidence intervals, a table, a record, a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inkstream.bench.records import write_record
from inkstream.engine.pictures.sheet import Mark, Tile, contact_sheet
from inkstream.evaluate.grades import Marks
from inkstream.evaluate.ocr import Reading
from inkstream.evaluate.run import open_picture

QUESTIONS: dict[str, str] = {
    "object_and_colour": "object and colour",
    "objects": "objects",
    "colours": "colours",
    "background": "background",
    "places": "places",
    "relation": "relation",
    "count": "count",
    "text_exact": "text exact",
    "asked": "asked change",
    "kept": "all else stayed",
}
"""Graded fields of Marks -> their names in the table."""

Z = 1.959964  # quantile of the normal distribution for a 95% interval


@dataclass(frozen=True)
class Judged:
    """A judged picture of a suite: picture number `seed` of case number `case`."""

    path: Path
    case: int
    seed: int
    group: str
    marks: Marks | None = None  # grades, if the case has a scene
    reading: Reading | None = None  # result of the second reader, if it was used

    @property
    def right(self) -> bool | None:
        """Whether the picture meets the whole prompt; None if nothing could be judged."""
        if self.marks is not None:
            answers = [getattr(self.marks, name) for name in QUESTIONS]
            return all(answer == 1 for answer in answers if answer is not None)
        return None if self.reading is None else self.reading.exact


@dataclass(frozen=True)
class Row:
    """One result. low, high: its 95% interval if it is a share; pictures: the number of pictures."""

    of: str  # drawn, truth, reconstruction, or a setting of a sweep
    measure: str
    group: str
    value: float
    low: float | None = None
    high: float | None = None
    pictures: int = 0


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` trials. Wilson 1927; it is also valid near 0 and 1."""
    if not count:
        return 0.0, 1.0
    middle = share + Z**2 / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    low, high = ((middle + sign * spread) / (1 + Z**2 / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def shares(judged: Sequence[Judged], of: str = "drawn") -> list[Row]:
    """Return all shares of the pictures' grades and readings. Questions without a picture are left out."""
    groups = list(dict.fromkeys(picture.group for picture in judged))
    rows = [_share(of, "all right", "all", [(j.right, 1) for j in judged])]
    rows += [_share(of, "all right", group, [(j.right, 1) for j in judged if j.group == group]) for group in groups]
    marked = [j.marks for j in judged if j.marks is not None]
    for field, name in QUESTIONS.items():
        rows.append(_share(of, name, "all", [(getattr(marks, field), 1) for marks in marked]))
    for group, belongs in LENGTHS.items():
        texts = [marks for marks in marked if marks.text_exact is not None and belongs(marks.script, marks.length)]
        rows.append(_share(of, "text exact", group, [(marks.text_exact, 1) for marks in texts]))
        for field, name in (("characters", "characters right"), ("ned", "likeness of text (NED)")):
            rows.append(_share(of, name, group, [(getattr(marks, field), marks.length) for marks in texts]))
    for group in groups:
        readings = [j.reading for j in judged if j.reading is not None and j.group == group]
        rows.append(_share(of, "text exact, second reader", group, [(r.exact, 1) for r in readings]))
        rows.append(_share(of, "likeness of text (NED), second reader", group, [(r.ned, 1) for r in readings]))
    return [row for row in rows if row.pictures]


LENGTHS: dict[str, Callable[[str | None, int | None], bool]] = {
    "English 1-3": lambda script, length: script == "latin" and (length or 0) <= 3,
    "English 1-6": lambda script, length: script == "latin" and (length or 0) <= 6,
    "English 7+": lambda script, length: script == "latin" and (length or 0) >= 7,
    "Chinese": lambda script, length: script == "hanzi",
}
"""Groups of texts by script and length."""


def _share(of: str, measure: str, group: str, found: Iterable[tuple[float | bool | None, int | None]]) -> Row:
    """Return the weighted mean of the values that are not None. The interval is for the number of these values."""
    asked = [(float(value), weight or 1) for value, weight in found if value is not None]
    total = sum(weight for _, weight in asked)
    share = sum(value * weight for value, weight in asked) / max(total, 1)
    low, high = wilson(share, len(asked))
    return Row(of, measure, group, share, low, high, len(asked))


# The table


def table(rows: Sequence[Row]) -> list[str]:
    """Format rows as lines: one block for each value of `of`, shares in percent with their intervals."""
    lines: list[str] = []
    width = max((len(_label(row)) for row in rows), default=0)
    for of in dict.fromkeys(row.of for row in rows):
        lines += [*([""] if lines else []), f"{of:<{width}}  {'':>8}  {'95% interval':<14}  pictures"]
        for row in (row for row in rows if row.of == of):
            if row.low is None or row.high is None:
                lines.append(f"{_label(row):<{width}}  {row.value:>8.4g}  {'':<14}  {row.pictures:>8}")
            else:
                interval = f"{row.low:.1%} - {row.high:.1%}"
                lines.append(f"{_label(row):<{width}}  {row.value:>8.1%}  {interval:<14}  {row.pictures:>8}")
    return lines


def matrix(rows: Sequence[Row], measures: Sequence[str]) -> list[str]:
    """Format a sweep as lines: one line for each setting, one column for each measure over all pictures."""
    shown = [name for name in measures if any(row.measure == name for row in rows)]
    found = {(row.of, row.measure): row for row in rows if row.group == "all"}
    settings = list(dict.fromkeys(row.of for row in rows))
    width = max(map(len, settings), default=0)
    lines = ["  ".join([f"{'sweep':<{width}}", *(f"{name:>17}" for name in shown)])]
    for of in settings:
        cells = [_cell(found.get((of, name))) for name in shown]
        lines.append("  ".join([f"{of:<{width}}", *(f"{cell:>17}" for cell in cells)]))
    return lines


def _label(row: Row) -> str:
    return f"  {row.measure}" if row.group == "all" else f"  {row.measure}, {row.group}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.value:.4g}" if row.low is None else f"{row.value:.1%}"


# The record


def record(name: str, date: str, command: str, ran: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> Path:
    """Write FOLDER/NAME.json in the format of `bench.records`. Its first row says how the suite was run."""
    flat = [{key: value for key, value in asdict(row).items() if value is not None} for row in rows]
    return write_record(name, date, command, {}, [{"of": "run", **ran}, *flat], folder)


# The contact sheet

TILES = 120


def write_sheet(judged: Sequence[Judged], prompts: Mapping[int, str], path: Path) -> None:
    """Write a contact sheet of at most TILES pictures, evenly spread. prompts: the prompt of each case.

    A right picture has a green frame, a wrong one a red frame. Each has its mark and its prompt.
    """
    most = min(TILES, len(judged))
    chosen = [judged[(2 * i + 1) * len(judged) // (2 * most)] for i in range(most)]
    contact_sheet([Tile(open_picture(j.path), prompts[j.case], MARKS[j.right]) for j in chosen]).save(path)


MARKS: dict[bool | None, Mark] = {True: "right", False: "wrong", None: "unknown"}
