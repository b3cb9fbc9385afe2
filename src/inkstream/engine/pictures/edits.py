"""Repainting a part of a picture: what the model draws of it, and how the drawn part is pasted back.

A picture to edit is a canvas: the start picture at its own size, extended where the request asks for it. The model
draws a window of the canvas, at a size of its own. All pixels that the mask does not repaint stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.engine.pictures.inputs import MAX_AREA, MAX_PIXELS, MAX_SIDE
from inkstream.engine.pictures.regions import WHITE, Greys, fade, grow, region_of
from inkstream.types import LONGEST, Context, Extension, InputError, MaskFill, Request

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of the canvas; right and bottom are exclusive."""

CELL = 8
"""Pixels over which a soft mask's result fades in: the side of a latent cell."""
LEAST = 32
"""The shortest side of a cropped part. With less context, a model does not see what it draws."""
GREY = 128
"""The colour of new space in pictures that a model looks at: #808080, which the prompt then asks it to fill."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """The picture that is edited. mask: at its size; drawn: the box of it that the model must see; start: the box of
    the start picture."""

    picture: Image.Image
    mask: Greys
    drawn: Box
    start: Box
    crops: bool

    def size_for(self, multiple: int, own: tuple[int, int]) -> tuple[int, int]:
        """Return the default size to draw at. own: the model's size.

        A picture is drawn at its own size, rounded up to the multiple, or scaled down to MAX_AREA. A cropped part that
        is smaller than the model's own size is enlarged to that.
        """
        width, height = sides_of(self.drawn)
        if self.crops and width <= own[0] and height <= own[1]:
            return own
        scale = min(1.0, math.sqrt(MAX_AREA / (width * height)), LONGEST / max(width, height))
        into = math.ceil if scale == 1 else round

        def side(pixels: int) -> int:
            return min(LONGEST // multiple, max(1, into(pixels * scale / multiple))) * multiple

        return side(width), side(height)


def canvas_of(request: Request, start: Image.Image) -> Canvas:
    """Return the canvas of a request that repaints. Raises InputError where its fields do not fit the start picture.

    start: the start picture, RGB, at its own size. New space holds the start picture's edge pixels.
    """
    mask = region_of(request, start)
    left, top, right, bottom = (0, 0, 0, 0)
    if request.extend is not None:
        left, top, right, bottom = Extension.read(request.extend).around(*start.size)
        width, height = start.width + left + right, start.height + top + bottom
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            limit = f"{MAX_PIXELS >> 20} megapixels or {MAX_SIDE} pixels a side"
            raise InputError(f"extend {request.extend} makes {width}x{height} pixels, more than the limit of {limit}")
        start = Image.fromarray(np.pad(np.asarray(start), ((top, bottom), (left, right), (0, 0)), "edge"))
        mask = np.pad(mask, ((top, bottom), (left, right)), constant_values=255)
    if request.mask_grow > 0:
        mask = grow(mask, request.mask_grow)
    whole = (0, 0, *start.size)
    drawn = whole if request.crop is None else surroundings(bounds(mask), Context.read(request.crop), start.size)
    inner = (left, top, start.width - right, start.height - bottom)
    return Canvas(start, mask, drawn, inner, request.crop is not None)


@dataclass(frozen=True, eq=False)
class Edit:
    """A canvas whose window is drawn at `size`. See Request for blur, soft and fill."""

    canvas: Canvas
    size: tuple[int, int]
    blur: int
    soft: bool
    fill: MaskFill

    @cached_property
    def window(self) -> Box:
        """The drawn part of the canvas, in the shape of `size`. It may reach beyond the canvas."""
        return window_of(self.canvas.drawn, self.size, self.canvas.picture.size)

    @cached_property
    def mask(self) -> Image.Image:
        """The mask at `size`, mode L: black and white, or with a soft mask the strengths."""
        strengths = self.canvas.mask
        if self.soft and self.blur:
            strengths = (strengths * self._share(self.blur)).round().astype(np.uint8)
        grey = self._seen(Image.fromarray(strengths), Image.Resampling.BILINEAR)
        return grey if self.soft else grey.point([255 * (value >= WHITE) for value in range(256)])

    @cached_property
    def start(self) -> Image.Image:
        """The window at `size`, with the repainted part filled: what the model starts from."""
        return filled(self._seen(self.canvas.picture, Image.Resampling.LANCZOS), self._hole, self.fill)

    @cached_property
    def shown(self) -> Image.Image:
        """The picture for a model that looks at it: as `start`, but new space that is not filled is grey."""
        left, top, right, bottom = self.canvas.start
        if self.fill != "original" or (left, top, right, bottom) == (0, 0, *self.canvas.picture.size):
            return self.start
        page = Image.new("RGB", self.canvas.picture.size, (GREY, GREY, GREY))
        page.paste(self.canvas.picture.crop(self.canvas.start), (left, top))
        return self._seen(page, Image.Resampling.LANCZOS)

    def paste(self, drawn: Image.Image) -> Image.Image:
        """Return the canvas with the drawn window pasted in. Where the mask is black, no byte changes."""
        if drawn.size != sides_of(self.window):
            drawn = drawn.resize(sides_of(self.window), Image.Resampling.LANCZOS)
        left, top, right, bottom = inside = self._inside
        patch = drawn.crop(
            (left - self.window[0], top - self.window[1], right - self.window[0], bottom - self.window[1])
        )
        share = self._share(min(self.blur, CELL) if self.soft else self.blur)[top:bottom, left:right]
        picture = self.canvas.picture.copy()
        picture.paste(patch, inside, Image.fromarray((share * 255).round().astype(np.uint8)))
        return picture

    @property
    def _inside(self) -> Box:
        """The part of the window that is inside the canvas."""
        (left, top, right, bottom), (width, height) = self.window, self.canvas.picture.size
        return max(left, 0), max(top, 0), min(right, width), min(bottom, height)

    @property
    def _hole(self) -> NDArray[np.bool_]:
        return np.asarray(self.mask) > 0

    def _share(self, pixels: int) -> NDArray[np.float32]:
        """The share of repainted pixels over the canvas; only the box of the mask is looked at."""
        mask = self.canvas.mask
        share = np.zeros(mask.shape, np.float32)
        left, top, right, bottom = bounds(mask)
        box = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
        share[box] = fade(mask[box], pixels)
        return share

    def _seen(self, picture: Image.Image, how: Image.Resampling) -> Image.Image:
        """The window of a picture of the canvas's size, at `size`. Beyond the canvas its edge pixels are repeated."""
        left, top, right, bottom = (abs(ends - end) for ends, end in zip(self.window, self._inside))
        pixels = np.asarray(picture.crop(self._inside))
        beyond = [(top, bottom), (left, right)]
        if any(map(any, beyond)):
            pixels = np.pad(pixels, (*beyond, *[(0, 0)] * (pixels.ndim - 2)), "edge")
        seen = Image.fromarray(pixels)
        return seen if seen.size == self.size else seen.resize(self.size, how)


# Boxes --------------------------------------------------------------------------------------------------------------


def bounds(mask: Greys) -> Box:
    """Return the smallest box that holds all of a mask that is not black."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def sides_of(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def surroundings(box: Box, context: Context, canvas: tuple[int, int]) -> Box:
    """Return a box with its context, inside the canvas, and not tiny."""
    found: list[tuple[int, int]] = []
    for axis, whole in enumerate(canvas):
        side = (box[axis + 2] - box[axis]) * context.factor + 2 * context.pixels
        middle = (box[axis] + box[axis + 2]) / 2
        found.append(placed(middle, min(whole, max(LEAST, math.ceil(side))), whole))
    (left, right), (top, bottom) = found
    return left, top, right, bottom


def placed(middle: float, side: int, whole: int) -> tuple[int, int]:
    """Return the ends of a side around a middle, moved into 0..whole, or centred on it if the side is longer."""
    low = (whole - side) // 2 if side > whole else min(max(round(middle - side / 2), 0), whole - side)
    return low, low + side


def window_of(box: Box, size: tuple[int, int], canvas: tuple[int, int]) -> Box:
    """Return the smallest window in the shape of `size` that holds a box. Its middle is the box's, if there is room.

    If `size` is the box's size rounded up to a multiple, the window has `size`, so that nothing is resampled.
    """
    across, down = sides_of(box)
    if all(0 <= pixels - side <= pixels / 8 and pixels - side < 64 for pixels, side in zip(size, (across, down))):
        sides = size
    else:
        scale = max(across / size[0], down / size[1])
        sides = max(across, round(size[0] * scale)), max(down, round(size[1] * scale))
    left, right = placed((box[0] + box[2]) / 2, sides[0], canvas[0])
    top, bottom = placed((box[1] + box[3]) / 2, sides[1], canvas[1])
    return left, top, right, bottom


# Fills --------------------------------------------------------------------------------------------------------------


def filled(picture: Image.Image, hole: NDArray[np.bool_], fill: MaskFill) -> Image.Image:
    """Return a picture with its hole (H, W) filled. Noise is the same for all seeds. Telea needs OpenCV."""
    if fill == "original":
        return picture
    pixels = np.asarray(picture)
    if fill == "telea":
        return Image.fromarray(_telea(pixels, hole))
    if fill == "noise":
        into = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    else:
        into = spread(pixels.astype(np.float32), ~hole).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.where(hole[..., None], into, pixels))


def spread(pixels: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return pixels (H, W, 3) whose unknown ones take the colours around them: by means of halved pictures, then back.

    Source: the pull-push algorithm of Gortler et al. 1996. If nothing is known, all is grey.
    """
    height, width = known.shape
    if known.all():
        return pixels
    if height == width == 1:
        return np.full_like(pixels, GREY)
    edges = (0, height % 2), (0, width % 2)
    weights = np.pad(known.astype(np.float32), edges)[..., None]
    sums = np.pad(pixels, (*edges, (0, 0))) * weights
    shape = weights.shape[0] // 2, 2, weights.shape[1] // 2, 2, -1
    counts = weights.reshape(shape).sum((1, 3))
    half = spread(sums.reshape(shape).sum((1, 3)) / counts.clip(1), counts[..., 0] > 0)
    layers = [Image.fromarray(half[..., i]).resize((width, height), Image.Resampling.BILINEAR) for i in range(3)]
    return np.where(known[..., None], pixels, np.stack([np.asarray(layer) for layer in layers], -1))


def _telea(pixels: NDArray[np.uint8], hole: NDArray[np.bool_]) -> NDArray[np.uint8]:
    try:
        import cv2
    except ImportError:
        raise InputError(
            "mask_fill telea needs OpenCV, which comes with the extra ocr: pip install 'inkstream[ocr]', or take blur"
        ) from None
    paint: Any = cv2.inpaint  # its stubs want other arrays
    return paint(np.ascontiguousarray(pixels), hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)
