"""The atlas: glyphs, emoji and shapes as alpha masks. Drawing and grading need no fonts and no FreeType.

The package holds one sheet of glyphs for each face, one sheet of emoji, and `atlas.json`. `build_atlas` makes them from
fonts.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from inkstream.pocket.vocabulary import EMOJI, FACES, HANZI, HANZI_FACES, LATIN, SHAPES
from inkstream.types import InputError

EM = 96  # pixels of one em in the sheets
CELL = 128  # side of a glyph's cell in pixels; the pen is at (ORIGIN, BASELINE)
ORIGIN, BASELINE = 10, 96
EMOJI_CELL = 96
SHAPE_CELL = 256
PAD = 32  # transparent pixels around each mask: resampled edges fade out inside the mask
COLUMNS = 24

_SANS = "/usr/share/fonts/truetype/dejavu/"
_CJK = "/usr/share/fonts/opentype/noto/"


@dataclass(frozen=True)
class Font:
    """A font file, the face in it, and the Debian package that contains it."""

    path: str
    package: str
    face: str = ""  # family name, if the file holds several faces


LATIN_FONTS: dict[str, Font] = {
    "sans": Font(_SANS + "DejaVuSans.ttf", "fonts-dejavu"),
    "bold": Font(_SANS + "DejaVuSans-Bold.ttf", "fonts-dejavu"),
    "serif": Font(_SANS + "DejaVuSerif-Bold.ttf", "fonts-dejavu"),
    "mono": Font(_SANS + "DejaVuSansMono-Bold.ttf", "fonts-dejavu"),
}
HANZI_FONTS: dict[str, Font] = {
    "sans": Font(_CJK + "NotoSansCJK-Regular.ttc", "fonts-noto-cjk", "Noto Sans CJK SC"),
    "bold": Font(_CJK + "NotoSansCJK-Bold.ttc", "fonts-noto-cjk", "Noto Sans CJK SC"),
    "serif": Font(_CJK + "NotoSerifCJK-Bold.ttc", "fonts-noto-cjk", "Noto Serif CJK SC"),
}
EMOJI_FONT = Font("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "fonts-noto-color-emoji")
EMOJI_STRIKE = 109  # the only size in the font


@dataclass(frozen=True)
class Glyph:
    """A mask, cropped to its ink and padded by PAD. left ... height: the ink's box relative to the pen, em, y down."""

    mask: Image.Image  # L
    left: float
    top: float
    width: float
    height: float
    advance: float


@dataclass(frozen=True, eq=False)
class Atlas:
    """The sheets, and each glyph's advance in em."""

    faces: Mapping[str, Image.Image]  # L; one cell for each glyph, in the order of `glyphs`
    glyphs: Mapping[str, str]  # face -> its characters
    advances: Mapping[str, Mapping[str, float]]
    emoji_sheet: Image.Image  # RGBA; one cell for each emoji, in the order of EMOJI


@lru_cache(maxsize=4096)
def glyph(atlas: Atlas, face: str, char: str) -> Glyph:
    """Return a character's glyph in a face. Raises KeyError if the face does not have the character."""
    advance = atlas.advances[face][char]
    cell = atlas.faces[face].crop(_cell(atlas.glyphs[face].index(char), CELL))
    left, top, right, bottom = box = cell.getbbox() or (ORIGIN, BASELINE, ORIGIN + 1, BASELINE + 1)
    return Glyph(
        _padded(cell.crop(box)), (left - ORIGIN) / EM, (top - BASELINE) / EM, (right - left) / EM, (bottom - top) / EM,
        advance,
    )  # fmt: skip


@lru_cache(maxsize=256)
def emoji(atlas: Atlas, name: str) -> Image.Image:
    """Return an emoji as RGBA; its longer side is EMOJI_CELL, padded by PAD. Raises ValueError for an unknown name."""
    sprite = atlas.emoji_sheet.crop(_cell(list(EMOJI).index(name), EMOJI_CELL))
    return _padded(sprite.crop(sprite.getchannel("A").getbbox()))


@lru_cache(maxsize=1)
def shapes() -> dict[str, Image.Image]:
    """Return the masks (L) of all shapes by name; the longer side is SHAPE_CELL, padded by PAD."""
    return {name: _shape(name) for name in SHAPES}


def _cell(index: int, size: int) -> tuple[int, int, int, int]:
    down, across = divmod(index, COLUMNS)
    return across * size, down * size, (across + 1) * size, (down + 1) * size


def _padded(image: Image.Image) -> Image.Image:
    padded = Image.new(image.mode, (image.width + 2 * PAD, image.height + 2 * PAD))
    padded.paste(image, (PAD, PAD))
    return padded


@lru_cache(maxsize=4)
def load_atlas(folder: Path = Path(__file__).parent / "atlas") -> Atlas:
    """Load the atlas of a folder; default: the package's atlas. Raises InputError if there is none."""
    try:
        table = json.loads((folder / "atlas.json").read_text("utf-8"))
        faces = {face: Image.open(folder / f"{face}.png").convert("L") for face in table["glyphs"]}
        emoji = Image.open(folder / "emoji.png").convert("RGBA")
    except OSError as error:
        raise InputError(f"{folder} holds no atlas ({error}): make one with scripts/build_atlas.py") from error
    advances = {face: dict(zip(chars, table["advances"][face])) for face, chars in table["glyphs"].items()}
    return Atlas(faces, table["glyphs"], advances, emoji)


def build_atlas(folder: Path, fonts: Path | None = None) -> None:
    """Draw all glyphs and emoji of the vocabulary into sheets.

    fonts: a folder with the font files under their own names; default: Debian's paths. Raises InputError for a missing
    font; the message names its package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    glyphs, advances = {}, {}
    for face in FACES:
        parts = [(LATIN_FONTS[face], LATIN)] + ([(HANZI_FONTS[face], "".join(HANZI))] if face in HANZI_FACES else [])
        glyphs[face] = "".join(chars for _, chars in parts)
        sheet = Image.new("L", (COLUMNS * CELL, math.ceil(len(glyphs[face]) / COLUMNS) * CELL))
        advances[face] = []
        for file, chars in parts:
            font = open_font(file, EM, fonts)
            for char in chars:
                across, down, *_ = _cell(len(advances[face]), CELL)
                cell = Image.new("L", (CELL, CELL))
                ImageDraw.Draw(cell).text((ORIGIN, BASELINE), char, font=font, fill=255, anchor="ls")
                sheet.paste(cell.point([round(v / 17) * 17 for v in range(256)]), (across, down))
                advances[face].append(round(font.getlength(char) / EM, 3))
        sheet.save(folder / f"{face}.png", optimize=True)
    _emoji_sheet(open_font(EMOJI_FONT, EMOJI_STRIKE, fonts)).save(folder / "emoji.png", optimize=True)
    table = {"em": EM, "glyphs": glyphs, "advances": advances}
    (folder / "atlas.json").write_text(json.dumps(table, ensure_ascii=False), "utf-8")


def open_font(font: Font, size: int, fonts: Path | None) -> ImageFont.FreeTypeFont:
    """Open a font at a size in pixels. Raises InputError if its file is missing; the message names its package."""
    path = Path(font.path) if fonts is None else fonts / Path(font.path).name
    if not path.is_file():
        raise InputError(f"{path} is missing: apt-get install {font.package}, or give the folder that holds it")
    data = path.read_bytes()  # given a path of a broken file, Pillow opens another file of that name
    for index in range(40):
        try:
            opened = ImageFont.truetype(io.BytesIO(data), size, index=index, layout_engine=ImageFont.Layout.BASIC)
        except OSError:
            break
        if font.face in ("", opened.getname()[0]):
            return opened
    raise InputError(f"{path} holds no face {font.face!r}: apt-get install {font.package} and use its file")


def _emoji_sheet(font: ImageFont.FreeTypeFont) -> Image.Image:
    sheet = Image.new("RGBA", (COLUMNS * EMOJI_CELL, math.ceil(len(EMOJI) / COLUMNS) * EMOJI_CELL))
    for i, char in enumerate(EMOJI.values()):
        sprite = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(sprite).text((8, 8), char, font=font, embedded_color=True)
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
        scale = EMOJI_CELL / max(sprite.size)
        size = (round(sprite.width * scale), round(sprite.height * scale))
        across, down, *_ = _cell(i, EMOJI_CELL)
        sheet.paste(sprite.resize(size, Image.Resampling.LANCZOS), (across, down))
    return sheet


def _shape(name: str) -> Image.Image:
    """Draw a shape's mask at four times its size and reduce it."""
    n = SHAPE_CELL * 4
    image = Image.new("L", (n, n))
    draw = ImageDraw.Draw(image)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(x * n, y * n) for x, y in points], fill=255)

    if name == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif name == "oval":
        draw.ellipse((0, n * 0.21, n - 1, n * 0.79), fill=255)
    elif name == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif name == "rectangle":
        draw.rectangle((0, n * 0.25, n - 1, n * 0.75), fill=255)
    elif name == "triangle":
        polygon([(0.5, 0.06), (1, 0.94), (0, 0.94)])
    elif name == "diamond":
        polygon([(0.5, 0), (0.86, 0.5), (0.5, 1), (0.14, 0.5)])
    elif name == "hexagon":
        polygon([(0.25, 0.067), (0.75, 0.067), (1, 0.5), (0.75, 0.933), (0.25, 0.933), (0, 0.5)])
    elif name == "star":
        radii = [0.52, 0.215]
        angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
        polygon([(0.5 + radii[k % 2] * math.cos(a), 0.52 + radii[k % 2] * math.sin(a)) for k, a in enumerate(angles)])
    elif name == "cross":
        draw.rectangle((n * 0.33, 0, n * 0.67, n - 1), fill=255)
        draw.rectangle((0, n * 0.33, n - 1, n * 0.67), fill=255)
    elif name == "ring":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        draw.ellipse((n * 0.24, n * 0.24, n * 0.76, n * 0.76), fill=0)
    elif name == "crescent":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        draw.ellipse((n * 0.34, -n * 0.06, n * 1.26, n * 0.86), fill=0)
    elif name == "arrow":
        polygon([(0, 0.33), (0.52, 0.33), (0.52, 0.1), (1, 0.5), (0.52, 0.9), (0.52, 0.67), (0, 0.67)])
    elif name == "heart":
        turns = [2 * math.pi * k / 200 for k in range(200)]
        x = [16 * math.sin(t) ** 3 for t in turns]
        y = [5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t) for t in turns]
        polygon([(0.5 + a / 32, 0.46 + b / 32) for a, b in zip(x, y)])
    elif name == "drop":
        draw.ellipse((n * 0.17, n * 0.34, n * 0.83, n - 1), fill=255)
        polygon([(0.5, 0), (0.806, 0.545), (0.194, 0.545)])
    box = image.getbbox()
    assert box, name
    image = image.crop(box)
    scale = SHAPE_CELL / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return _padded(image.resize(size, Image.Resampling.BOX))
