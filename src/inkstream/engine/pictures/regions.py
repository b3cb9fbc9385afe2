"""The part of a picture to repaint: from a mask, a colour, written text or transparency; grown, shrunk and faded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from inkstream.engine.pictures.inputs import open_alpha, open_mask, short_name
from inkstream.types import InputError, MaskSource, Request

Greys = NDArray[np.uint8]
"""A mask (H, W): 255 is repainted, 0 is kept."""

WHITE = 128
"""From this grey on, a pixel of a mask that is not soft is white."""


def region_of(request: Request, start: Image.Image) -> Greys:
    """Return the mask of a request, at the size of its start picture. Raises InputError if it is black everywhere.

    start: the start picture, RGB. With a soft mask the greys are kept. Without a mask all of it is black.
    """
    if request.mask is not None:
        found = open_mask(request.mask, start.size)
        nothing = f"{short_name(request.mask)} is black everywhere: paint white what is to be repainted"
    elif request.mask_from is not None:
        found, nothing = _found(MaskSource.read(request.mask_from), request.image or "", start)
    else:
        return np.zeros((start.height, start.width), np.uint8)
    mask = np.asarray(ImageOps.invert(found) if request.mask_invert else found)
    if not request.mask_soft:
        mask = np.where(mask >= WHITE, np.uint8(255), np.uint8(0))
    if not mask.any():
        raise InputError(
            "the inverted mask is black everywhere: leave mask_invert out" if request.mask_invert else nothing
        )
    if request.mask_grow < 0:
        mask = 255 - grow(255 - mask, -request.mask_grow)
        if not mask.any():
            raise InputError(f"mask_grow {request.mask_grow} leaves nothing of the mask: shrink it by less")
    return mask


def _found(source: MaskSource, picture: str, start: Image.Image) -> tuple[Image.Image, str]:
    """Return the mask made from a picture, and what to say if it is black everywhere."""
    if source.kind == "alpha":
        return open_alpha(picture, start.size), f"{short_name(picture)} has no transparent pixels: give a mask"
    if source.kind == "colour":
        colour = np.array([int(source.value[i : i + 2], 16) for i in (1, 3, 5)], np.int16)
        apart = np.abs(np.asarray(start, np.int16) - colour).max(-1)
        nothing = f"no pixel is within {source.tolerance} of {source.value}: take another colour, or {source.value}~255"
        return Image.fromarray((apart <= source.tolerance).astype(np.uint8) * 255), nothing
    from inkstream.engine.pictures.ocr import boxes_of, lines_in

    lines = lines_in(start)
    page = Image.new("L", start.size)
    for corners in boxes_of(lines, source.value):
        ImageDraw.Draw(page).polygon(corners, fill=255)
    written = ", ".join(repr(line.text[:40]) for line in lines[:5]) or "no text"
    return page, f"text {source.value[:40]!r} is not found, the picture reads {written}: give a mask"


def grow(mask: Greys, pixels: int) -> Greys:
    """Return the brightest value within `pixels` of each pixel, in a square."""
    for axis in (0, 1):
        edges = [(0, 0), (0, 0)]
        edges[axis] = (pixels, pixels)
        lines = np.moveaxis(np.pad(mask, edges), axis, 0)
        span, whole = 1, 2 * pixels + 1
        while span < whole:  # each line is the maximum of `span` lines from it on
            step = min(span, whole - span)
            lines = np.maximum(lines[:-step], lines[step:])
            span += step
        mask = np.moveaxis(lines, 0, axis)
    return np.ascontiguousarray(mask)


def fade(mask: Greys, pixels: int) -> NDArray[np.float32]:
    """Return the share of the repainted pixels: 0 outside the mask, rising linearly to 1 over `pixels` inside its edge.

    The picture's border is no edge. If the mask is less deep than `pixels` everywhere, it rises over that depth.
    """
    depth = depth_of(mask > 0, pixels + 1)
    return depth.astype(np.float32) / np.float32(max(int(depth.max(initial=0)), 1))


def depth_of(inside: NDArray[np.bool_], most: int) -> NDArray[np.int32]:
    """Return the Chebyshev distance of each pixel inside to the nearest one that is not, up to `most`. (H, W)."""
    depth = np.where(inside, np.int32(1 << 24), np.int32(0))
    columns = np.arange(inside.shape[1], dtype=np.int32)
    for rows in (depth, depth[::-1]):  # downwards, then upwards
        for y, row in enumerate(rows):
            if y:
                above = rows[y - 1] + 1
                np.minimum(row, above, out=row)
                np.minimum(row[1:], above[:-1], out=row[1:])
                np.minimum(row[:-1], above[1:], out=row[:-1])
            np.minimum(row, np.minimum.accumulate(row - columns) + columns, out=row)
            np.minimum(row, (np.minimum.accumulate((row + columns)[::-1]) - columns[::-1])[::-1], out=row)
    return np.minimum(depth, most)
