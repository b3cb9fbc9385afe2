"""Reference pictures of Z-Image and FLUX.2: limits, the size that a model sees, joining of several. Needs only PIL."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from inkstream.types import InputError

MULTIPLE = 16
"""Sides are multiples of this number: a token is 16 x 16 pixels."""
MIN_SIDE = 64
MAX_RATIO = 8
ONE_AREA = 2024 * 2024
"""The most pixels that the model sees of a single reference. The release uses 2024, not 2048."""
SEVERAL_AREA = 1024 * 1024
"""The most pixels that the model sees of each of several references. diffusers uses it for a single one too."""
TOKENS = 9 * 4096
"""The most tokens of picture and references together: 9 megapixels, the limit of the service that hosts FLUX.2."""

Size = tuple[int, int]
"""Width and height in pixels."""


def check_references(
    sizes: Sequence[Size], output: Size, most: int, tokens: int = TOKENS, sources: int = 0, area: int | None = None
) -> None:
    """Raises InputError where references do not fit, before anything is decoded or scaled.

    sizes: of the unchanged references. output: of the picture to draw. most: the most references the model can take.
    sources: 1 if the start picture, at the size of the output, is a reference too. area: as in `prepare_references`.
    """
    if len(sizes) + sources > most:
        given = f"{len(sizes)} references{' and a start picture' if sources else ''}"
        raise InputError(f"{given} were given and the model takes at most {most}: leave some out")
    for number, (width, height) in enumerate(sizes, start=1):
        if min(width, height) < MIN_SIDE:
            raise InputError(f"reference {number} is {width} by {height} pixels: both sides need {MIN_SIDE} or more")
        if max(width, height) > MAX_RATIO * min(width, height):
            raise InputError(f"reference {number} is {width} by {height} pixels: crop it to {MAX_RATIO} to 1 or less")
    area = area_for(len(sizes)) if area is None else area
    drawn = tokens_of(output)
    seen = sum(tokens_of(fitted_size(size, area)) for size in sizes) + drawn * sources
    if drawn + seen > tokens:
        raise InputError(
            f"the picture, {output[0]} by {output[1]} pixels, takes {drawn} tokens and the references take {seen}, "
            f"but at most {tokens} tokens fit: draw smaller, or give fewer or smaller references"
        )


def prepare_references(images: Sequence[Image.Image], area: int | None = None) -> list[Image.Image]:
    """Scales each picture down to `area` pixels if it is larger, crops its middle to whole tokens, makes it RGB.

    area: None takes FLUX.2's limit, which depends on the number of pictures.
    """
    area = area_for(len(images)) if area is None else area
    return [crop_to_multiple(cap_area(image.convert("RGB"), area)) for image in images]


def area_for(count: int) -> int:
    """The most pixels that the model sees of each of this many references."""
    return ONE_AREA if count == 1 else SEVERAL_AREA


def fitted_size(size: Size, area: int) -> Size:
    """The size that `prepare_references` gives a picture of this size."""
    width, height = _capped(size, area)
    return width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE


def default_size(first: Size) -> Size:
    """The default size to draw at: the first reference's, limited to one megapixel."""
    return fitted_size(first, SEVERAL_AREA)


def tokens_of(size: Size) -> int:
    """The number of tokens of a picture of this size."""
    return (size[0] // MULTIPLE) * (size[1] // MULTIPLE)


def cap_area(image: Image.Image, area: int) -> Image.Image:
    """The picture, scaled down if it has more than `area` pixels, never up."""
    size = _capped(image.size, area)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def crop_to_multiple(image: Image.Image) -> Image.Image:
    """The middle of the picture, with both sides rounded down to the multiple."""
    width, height = (side // MULTIPLE * MULTIPLE for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def join_references(images: Sequence[Image.Image]) -> Image.Image:
    """Joins the pictures for a language model: left to right on white, each centred vertically."""
    if len(images) == 1:
        return images[0].convert("RGB")
    page = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        page.paste(image.convert("RGB"), (left, (page.height - image.height) // 2))
        left += image.width
    return page


def _capped(size: Size, area: int) -> Size:
    width, height = size
    if width * height <= area:
        return size
    scale = math.sqrt(area / (width * height))
    return int(width * scale), int(height * scale)
