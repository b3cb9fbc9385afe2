"""Draws scenes: masks of the atlas are resampled at sub-pixel positions and composed with Pillow."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image

from inkstream.pocket.atlas import PAD, Atlas, emoji, glyph, load_atlas, shapes
from inkstream.pocket.colours import COLOURS
from inkstream.pocket.scenes import BASELINE, SPACE, TRACKING, Background, Scene, Thing, Writing, line_width


def render(scene: Scene, width: int, height: int | None = None, atlas: Atlas | None = None) -> Image.Image:
    """Draw a scene as RGB. Positions are shares of width and height; sizes are shares of the shorter side."""
    height = height or width
    atlas = atlas or load_atlas()
    picture = _ground(scene.background, width, height).copy()
    for thing in scene.things:
        _draw_thing(picture, thing, atlas)
    for writing in scene.writings:
        _draw_writing(picture, writing, atlas)
    return picture


@lru_cache(maxsize=512)
def _ground(ground: Background, width: int, height: int) -> Image.Image:
    colours = [np.array(COLOURS[name], np.float32) for name in ground.colours]
    if ground.kind == "flat":
        return Image.new("RGB", (width, height), COLOURS[ground.colours[0]])
    length = width if ground.across else height
    share = (np.arange(length, dtype=np.float32) + 0.5) / length
    if ground.kind == "split":
        share = np.clip((share - 0.5) * length + 0.5, 0, 1)
    line = colours[0] + (colours[1] - colours[0]) * share[:, None]
    pixels = np.rint(line).astype(np.uint8)
    pixels = pixels[None, :].repeat(height, 0) if ground.across else pixels[:, None].repeat(width, 1)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _draw_thing(picture: Image.Image, thing: Thing, atlas: Atlas) -> None:
    mask = shapes()[thing.name] if thing.colour else emoji(atlas, thing.name)
    inner = mask.width - 2 * PAD, mask.height - 2 * PAD
    scale = thing.side * min(picture.size) / max(inner)
    left = thing.x * picture.width - inner[0] * scale / 2
    top = thing.y * picture.height - inner[1] * scale / 2
    _stamp(picture, mask, left, top, scale, scale, COLOURS[thing.colour] if thing.colour else None)


def _draw_writing(picture: Image.Image, writing: Writing, atlas: Atlas) -> None:
    em = writing.em * min(picture.size)
    pen = writing.x * picture.width - line_width(writing.text, writing.face) * em / 2
    baseline = writing.y * picture.height + (BASELINE - 0.5) * em
    for char in writing.text:
        if char == " ":
            pen += (SPACE + TRACKING) * em
            continue
        found = glyph(atlas, writing.face, char)
        inner = found.mask.width - 2 * PAD, found.mask.height - 2 * PAD
        _stamp(
            picture, found.mask, pen + found.left * em, baseline + found.top * em, found.width * em / inner[0],
            found.height * em / inner[1], COLOURS[writing.colour],
        )  # fmt: skip
        pen += (found.advance + TRACKING) * em


def _stamp(
    picture: Image.Image, mask: Image.Image, left: float, top: float, across: float, down: float,
    colour: tuple[int, int, int] | None,
) -> None:  # fmt: skip
    """Paste a padded mask with its inner corner at (left, top). across, down: picture pixels per mask pixel."""
    right, bottom = left + (mask.width - 2 * PAD) * across, top + (mask.height - 2 * PAD) * down
    x0, y0, x1, y1 = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    box = (
        max(PAD + (x0 - left) / across, 0),
        max(PAD + (y0 - top) / down, 0),
        min(PAD + (x1 - left) / across, mask.width),
        min(PAD + (y1 - top) / down, mask.height),
    )
    size = x1 - x0, y1 - y0
    sprite = mask.resize(size, Image.Resampling.BICUBIC if across > 1 else Image.Resampling.BOX, box)
    if colour is None:
        picture.paste(sprite, (x0, y0), sprite)
    else:
        picture.paste(colour, (x0, y0, x1, y1), sprite)
