"""A contact sheet: a grid of pictures on white, each with a caption and a label or a mark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from inkstream.pocket.letters import BASELINE, EM, characters, letter

Mark = Literal["right", "wrong", "unknown"]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

TILE = 160
"""A picture's longer side, in pixels."""
LINES = 5
"""The most lines of a caption."""
GREEN, RED, GRAY = (30, 140, 60), (205, 40, 40), (150, 150, 150)
COLOURS: dict[Mark, Colour] = {"right": GREEN, "wrong": RED, "unknown": GRAY}
INK, FAINT, HAIR = (25, 25, 28), (120, 120, 126), (216, 216, 220)

FACES = {
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc": 2,
    "/System/Library/Fonts/PingFang.ttc": 0,
    "C:/Windows/Fonts/msyh.ttc": 0,
}
"""Font files that hold Hanzi -> the index of the face for simplified Chinese."""


@dataclass(frozen=True)
class Tile:
    """A picture and its caption `words`. A mark or a label stands before the caption; a mark colours the frame too."""

    picture: Image.Image
    words: str
    mark: Mark | None = None
    label: str = ""


def contact_sheet(
    tiles: Sequence[Tile], columns: int = 12, size: int = TILE, heading: str = "", note: str = ""
) -> Image.Image:
    """The tiles in rows. heading: large text above the tiles. note: small text below the heading.

    size: a picture's longer side, in pixels. The font size follows from it.
    """
    columns = max(1, min(columns, len(tiles)))
    pictures = [_fit(tile.picture, size) for tile in tiles]
    signs = [indent(tile, size) for tile in tiles]
    wide = max((picture.width for picture in pictures), default=size)
    tall = max((picture.height for picture in pictures), default=size)
    words = [wrapped(tile.words, wide, size, sign) for tile, sign in zip(tiles, signs)]
    edge, line, large = edge_of(size), line_of(size), size * 3 // 2
    across = wide + 2 * edge
    deep = line * max(map(len, words), default=0) + (edge if any(tile.label for tile in tiles) else 0)
    down = tall + 2 * edge + deep
    title = wrapped(heading, columns * across - 2 * edge, large, lines=3) if heading else []
    noted = edge + len(title) * line_of(large) + edge // 2
    above = noted + line + edge if title or note else 0
    sheet = Image.new("RGB", (columns * across, above + math.ceil(len(tiles) / columns) * down + edge), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(title):
        _draw_text(sheet, (edge, edge + number * line_of(large)), text, INK, large)
    _draw_text(sheet, (edge, noted), note, FAINT, size)
    for number, (tile, picture) in enumerate(zip(tiles, pictures)):
        left, top = number % columns * across + edge, above + number // columns * down + edge
        x, y = left + (wide - picture.width) // 2, top + tall - picture.height
        frame, colour = (3, COLOURS[tile.mark]) if tile.mark else (1, HAIR)
        draw.rectangle((x - frame, y - frame, x + picture.width + frame - 1, y + picture.height + frame - 1), colour)
        sheet.paste(picture, (x, y))
        below = top + tall + 4
        if tile.mark:
            _draw_mark(draw, left, below + 1, tile.mark)
        if tile.label:
            below += edge // 2
            _draw_label(draw, left, below, tile.label, size)
        for row, text in enumerate(words[number]):
            at = (left + (0 if row else signs[number]), below + row * line)
            _draw_text(sheet, at, text, INK if tile.mark else FAINT, size)
    return sheet


def edge_of(size: int) -> int:
    """The margin on each side of a tile of that size, in pixels."""
    return max(6, size // 26)


def line_of(size: int) -> int:
    """The distance from one caption line to the next, in pixels."""
    return em_of(size) * 14 // 11


def em_of(size: int) -> int:
    """The font size of a caption, in pixels."""
    return max(11, size // 20)


def indent(tile: Tile, size: int) -> int:
    """The width of a tile's mark or label, by which the caption's first line is indented. In pixels."""
    if tile.label:
        return _plate_width(tile.label, size) + em_of(size) // 2
    return em_of(size) + 3 if tile.mark else 0


def wrapped(text: str, width: int, size: int, indent: int = 0, lines: int = LINES) -> list[str]:
    """Wraps a text into at most `lines` lines of `width` pixels; a longer text ends with an ellipsis.

    indent: pixels by which the first line is shorter. size: the tile's size, which sets the font size.
    """
    words = [part for word in text.split() for part in _parts(word, width - indent, size)]
    found, room = [""], width - indent
    for word, joined in words:
        longer = f"{found[-1]}{' ' if joined and found[-1] else ''}{word}"
        if length_of(longer, size) <= room:
            found[-1] = longer
        else:
            found.append(word)
            room = width
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][:-1] + "…"]
    return found


@lru_cache(maxsize=4)
def font(size: int) -> Font:
    """The caption font for a tile of that size: the first font of FACES on this machine, else Pillow's own."""
    path = _system_font()
    return ImageFont.load_default(em_of(size)) if path is None else ImageFont.truetype(path, em_of(size), FACES[path])


@lru_cache(maxsize=1)
def _system_font() -> str | None:
    """The first font file of FACES on this machine. Without one, the package's masks draw Hanzi and kana."""
    return next((path for path in FACES if Path(path).is_file()), None)


def length_of(text: str, size: int) -> float:
    """The width of a line of a caption, in pixels."""
    return sum(len(run) * em_of(size) if masked else font(size).getlength(run) for run, masked in _runs(text))


def _runs(text: str) -> Iterator[tuple[str, bool]]:
    """The runs of a text, and whether masks of the package draw them: characters that the caption font lacks."""
    lacking = characters().keys() if _system_font() is None else ()
    for masked, run in groupby(text, lambda char: char in lacking):
        yield "".join(run), masked


def _draw_text(sheet: Image.Image, at: tuple[int, int], text: str, ink: Colour, size: int) -> None:
    """Draws one line of text with its top left corner at `at`."""
    draw, letters, em = ImageDraw.Draw(sheet), font(size), em_of(size)
    x, y = float(at[0]), at[1]
    baseline = letters.getbbox("H")[3]
    for run, masked in _runs(text):
        if not masked:
            draw.text((x, y), run, fill=ink, font=letters)
            x += letters.getlength(run)
            continue
        for char in run:
            mask = letter(char).resize((em, em), Image.Resampling.LANCZOS)
            sheet.paste(ink, (round(x), y + round(baseline - em * BASELINE / EM)), mask)
            x += em


def _parts(word: str, width: int, size: int) -> list[tuple[str, bool]]:
    """The unbreakable parts of a word, and whether a space goes before each.

    A word that is wider than `width` or not ASCII is broken into characters.
    """
    if word.isascii() and length_of(word, size) <= width:
        return [(word, True)]
    return [(char, i == 0) for i, char in enumerate(word)]


def _fit(picture: Image.Image, size: int) -> Image.Image:
    """Scales a picture's longer side to `size`. Nearest neighbour enlarges by 2 or more, Lanczos does the rest."""
    scale = size / max(picture.size)
    fitted = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(fitted, method)


def _draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, mark: Mark) -> None:
    """Draws a tick, a cross or a dash, 9 pixels wide. The shapes differ, so colours are not needed to read them."""
    colour = COLOURS[mark]
    if mark == "unknown":
        draw.line([(x, y + 5), (x + 9, y + 5)], fill=colour, width=2)
    elif mark == "right":
        draw.line([(x, y + 5), (x + 3, y + 9), (x + 9, y)], fill=colour, width=2)
    else:
        draw.line([(x, y), (x + 9, y + 9)], fill=colour, width=2)
        draw.line([(x, y + 9), (x + 9, y)], fill=colour, width=2)


def _draw_label(draw: ImageDraw.ImageDraw, x: int, y: int, label: str, size: int) -> None:
    """Draws a label in white on a dark plate with round corners, a little higher than the text line."""
    em = em_of(size)
    plate = (x, y - em // 8, x + _plate_width(label, size), y + em * 3 // 2)
    draw.rounded_rectangle(plate, radius=em // 3, fill=INK)
    middle = (plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2
    draw.text(middle, label, fill="white", font=font(size), anchor="mm")


def _plate_width(label: str, size: int) -> int:
    """The width of a label's plate, in pixels."""
    return math.ceil(max(em_of(size) * 3 / 2, font(size).getlength(label) + em_of(size)))
