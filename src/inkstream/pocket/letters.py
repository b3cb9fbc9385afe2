"""Small masks of Chinese and Japanese characters: captions show them without a font of the system.

The package holds one sheet of all characters of GB 2312. `build_letters` draws it from a font.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw

from inkstream.pocket.atlas import HANZI_FONTS, open_font

EM = 16
"""Side of a mask in pixels: one em."""
BASELINE = 14
"""Distance of the baseline from the top of a mask, in pixels."""
COLUMNS = 64
LEVELS = 4
SHEET = Path(__file__).parent / "atlas" / "letters.png"


@lru_cache(maxsize=1)
def characters() -> dict[str, int]:
    """Return character -> its number in the sheet: marks, full-width letters, kana and Hanzi of GB 2312, in order.

    The rows of GB 2312 are those of the standard: 1 marks, 3 full-width ASCII, 4 and 5 kana, 16 to 87 Hanzi.
    """
    rows = (1, 3, 4, 5, *range(16, 88))
    codes = (bytes((0xA0 + row, 0xA0 + column)) for row in rows for column in range(1, 95))
    known = (code.decode("gb2312", "ignore") for code in codes)
    return {char: number for number, char in enumerate(char for char in known if char and ord(char) > 0x2E80)}


@lru_cache(maxsize=2048)
def letter(char: str) -> Image.Image:
    """Return the mask (L, EM x EM) of a character. Raises KeyError if the sheet does not have it."""
    return _sheet().crop(_cell(characters()[char]))


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    with Image.open(SHEET) as sheet:
        return sheet.convert("L")


def _cell(number: int) -> tuple[int, int, int, int]:
    down, across = divmod(number, COLUMNS)
    return across * EM, down * EM, (across + 1) * EM, (down + 1) * EM


def build_letters(folder: Path, fonts: Path | None = None) -> None:
    """Draw the sheet into folder/letters.png, with LEVELS levels of gray. fonts: see `atlas.build_atlas`."""
    font = open_font(HANZI_FONTS["sans"], EM, fonts)
    sheet = Image.new("L", (COLUMNS * EM, math.ceil(len(characters()) / COLUMNS) * EM))
    for char, number in characters().items():
        mask = Image.new("L", (EM, EM))
        ImageDraw.Draw(mask).text((0, BASELINE), char, font=font, fill=255, anchor="ls")
        sheet.paste(mask, _cell(number))
    steps = sheet.point([round(value / 255 * (LEVELS - 1)) for value in range(256)])
    steps = steps.convert("P")
    steps.putpalette([round(level / (LEVELS - 1) * 255) for level in range(LEVELS) for _ in range(3)])
    steps.save(folder / SHEET.name, optimize=True, bits=(LEVELS - 1).bit_length())
