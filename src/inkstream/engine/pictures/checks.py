"""Whether a picture shows what is asked for: texts by rapidocr, colours by their distances. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.engine.pictures.asked import Asked
from inkstream.engine.pictures.ocr import distance, fold, lines_in
from inkstream.pocket.colours import lab

TOLERANCE = 5.0
"""Largest deltaE2000 of an area from the colour that it claims. 2.3 is just noticeable."""
AREA = 0.005
"""Smallest area of a colour, as a share of the picture."""
SIDE = 384
"""Colours are looked for in a picture whose longer side has at most so many pixels."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TextCheck:
    """Whether a text is written in a picture. Case, spaces and look-alikes such as 0 and O do not count."""

    wanted: str
    found: str  # the words that are nearest to it; empty if nothing was read
    exact: bool
    ned: float  # 1 - edit distance / the longer of both lengths
    errors: int  # edit distance: wrong, missing and additional characters
    length: int  # characters of the wanted text, as they are counted for `errors`
    script: str

    @property
    def line(self) -> str:
        if self.exact:
            return f'text "{self.wanted}" exact'
        plural = "" if self.errors == 1 else "s"
        read = f'read as "{self.found}"' if self.found else "not found"
        return f'text "{self.wanted}" {read}, {self.errors} character{plural} wrong'


@dataclass(frozen=True)
class ColourCheck:
    """Whether an area of a picture has a colour."""

    wanted: str
    nearest: str  # the colour of the area that is nearest to it
    delta_e: float  # deltaE2000 of that area; AREA of the picture is as near or nearer
    share: float  # share of the picture within TOLERANCE
    right: bool

    @property
    def line(self) -> str:
        near = f"within {self.delta_e:.1f}" if self.right else f"missing, nearest {self.nearest} at {self.delta_e:.1f}"
        return f"colour {self.wanted} {near}"


@dataclass(frozen=True)
class Checks:
    """The checks of a picture."""

    texts: tuple[TextCheck, ...] = ()
    colours: tuple[ColourCheck, ...] = ()

    @property
    def passed(self) -> bool:
        return all(text.exact for text in self.texts) and all(colour.right for colour in self.colours)

    @property
    def rank(self) -> tuple[int, float]:
        """How near the picture is to passing: what is right, then how near the rest is. A higher one is better."""
        right = sum(text.exact for text in self.texts) + sum(colour.right for colour in self.colours)
        near = sum(text.ned for text in self.texts) - sum(colour.delta_e for colour in self.colours) / 100
        return right, near

    @property
    def line(self) -> str:
        return "; ".join(check.line for check in (*self.texts, *self.colours))


def check_picture(picture: Image.Image, asked: Asked) -> Checks:
    """Check a picture. Raises InputError if texts are asked for and the extra `ocr` is not installed."""
    lines = [line.text for line in lines_in(picture)] if asked.texts else []
    return Checks(tuple(check_text(lines, text) for text in asked.texts), check_colours(picture, asked.colours))


def check_text(lines: Sequence[str], wanted: str) -> TextCheck:
    """Compare a text with the lines that were read, in reading order.

    It is compared with each run of neighbouring words, which may go over several lines. Chinese characters without a
    space or a mark between them are one word, so an additional character at an end is an error.
    """
    goal, words = fold(wanted), [word for line in lines for word in line.split()]
    best, found = len(goal), ""
    for start in range(len(words)):
        letters = ""
        for end in range(start, len(words)):
            letters += fold(words[end])
            if len(letters) > 2 * len(goal) + 2 and end > start:
                break
            errors = distance(letters, goal)
            if errors < best:
                best, found = errors, " ".join(words[start : end + 1])
    longer = max(len(goal), len(fold(found)), 1)
    return TextCheck(wanted, found, best == 0, 1 - min(best, longer) / longer, best, len(goal), script_of(wanted))


SCRIPTS = {"HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean", "CJK": "Chinese", "LATIN": "Latin",
           "CYRILLIC": "Cyrillic", "GREEK": "Greek", "ARABIC": "Arabic", "THAI": "Thai"}  # fmt: skip
"""The first word of a letter's Unicode name -> its script. Of a mixed text, the first one in this table counts."""


def script_of(text: str) -> str:
    """Return the script of a text: Latin for one without letters."""
    begins = {unicodedata.name(char, "").split(" ", 1)[0] for char in text}
    return next((script for begin, script in SCRIPTS.items() if begin in begins), "Latin")


def check_colours(picture: Image.Image, wanted: Sequence[str]) -> tuple[ColourCheck, ...]:
    """Check for each colour whether an area of the picture has it.

    The distance of a pixel is the largest one among its 3 x 3 neighbours, so that the mixed colours of edges, which are
    one pixel wide, claim nothing.
    """
    if not wanted:
        return ()
    pixels = _reduced(picture)
    seen = lab(pixels)
    return tuple(_check_colour(pixels, seen, colour) for colour in wanted)


def _check_colour(pixels: NDArray[np.uint8], seen: Floats, wanted: str) -> ColourCheck:
    """pixels, seen: (H, W, 3), the picture as sRGB and Lab."""
    rgb = [int(wanted[at : at + 2], 16) for at in (1, 3, 5)]
    away = _largest_around(delta_e2000(seen, lab(rgb)))  # (H, W)
    count = max(1, round(AREA * away.size))
    most = float(np.partition(away.reshape(-1), count - 1)[count - 1])
    nearest = np.median(pixels[away <= most], axis=0)
    share = float((away <= TOLERANCE).mean())
    name = "#" + "".join(f"{round(float(value)):02x}" for value in nearest)
    return ColourCheck(wanted, name, round(most, 2), round(share, 4), most <= TOLERANCE)


def _reduced(picture: Image.Image) -> NDArray[np.uint8]:
    """The picture as (H, W, 3), reduced by a whole factor if it is large. Transparent parts are white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layers = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    picture = picture.convert("RGB")
    return np.asarray(picture.reduce(max(1, -(-max(picture.size) // SIDE))))


def _largest_around(values: Floats) -> Floats:
    """The largest of each pixel's 3 x 3 neighbours; outside, edge pixels repeat."""
    for axis in (0, 1):
        wide = np.pad(values, [(1, 1) if axis == at else (0, 0) for at in (0, 1)], mode="edge")
        size = values.shape[axis]
        values = np.max([np.take(wide, range(at, at + size), axis) for at in range(3)], axis=0)
    return values


def delta_e2000(a: Floats, b: Floats) -> Floats:
    """Return the colour difference CIEDE2000 of CIE Lab colours. a, b: (..., 3). Sharma, Wu and Dalal 2005."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)  # pyright: ignore[reportAssignmentType]
    chroma = (np.hypot(a[..., 1], a[..., 2]) + np.hypot(b[..., 1], b[..., 2])) / 2
    gain = 1 + 0.5 * (1 - np.sqrt(chroma**7 / (chroma**7 + 25.0**7)))
    c1, c2 = (np.hypot(gain * colour[..., 1], colour[..., 2]) for colour in (a, b))
    h1, h2 = (np.degrees(np.arctan2(colour[..., 2], gain * colour[..., 1])) % 360 for colour in (a, b))
    grey = c1 * c2 == 0
    turn = (h2 - h1 + 180) % 360 - 180
    turn = np.where(grey, 0, np.where(turn == -180, 180, turn))
    lightness, chroma, delta_l, delta_c = (a[..., 0] + b[..., 0]) / 2, (c1 + c2) / 2, b[..., 0] - a[..., 0], c2 - c1
    delta_h = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    hue = np.where(grey, h1 + h2, (h1 + h2) / 2 + np.where(abs(h1 - h2) > 180, np.where(h1 + h2 < 360, 180, -180), 0))
    waves = ((-30, -0.17, 1), (0, 0.24, 2), (6, 0.32, 3), (-63, -0.20, 4))
    t = 1 + sum(weight * np.cos(np.radians(times * hue + phase)) for phase, weight, times in waves)
    s_l = 1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    rotation = -np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2)))) * 2
    rotation = rotation * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    x, y, z = delta_l / s_l, delta_c / s_c, delta_h / s_h
    return np.sqrt(np.maximum(x**2 + y**2 + z**2 + rotation * y * z, 0)).astype(np.float32)
