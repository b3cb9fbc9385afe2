"""FLUX.2's reference pictures: what is refused, the size each is seen at, and how several become one. PIL alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from inkstream.types import InputError

MULTIPLE = 16
"""Sides are multiples of it: a token is 16 by 16 pixels."""
MIN_SIDE = 64
MAX_RATIO = 8
ONE_AREA = 2024 * 2024
"""The most pixels that are seen of a reference that is alone. 2024 is what the release says."""
SEVERAL_AREA = 1024 * 1024
"""The most pixels that are seen of each of several references; diffusers keeps a single one to it too."""
TOKENS = 9 * 4096
"""The most tokens of picture and references together: 9 megapixels, what the service that hosts FLUX.2 takes."""

Size = tuple[int, int]
"""Width and height in pixels."""


def check_references(sizes: Sequence[Size], output: Size, most: int, tokens: int = TOKENS) -> None:
    """InputError where a reference cannot be taken, before anything is decoded or scaled.

    sizes: of the references as they are; output: of the picture to draw; most: references the model is good for.
    """
    if len(sizes) > most:
        raise InputError(f"{len(sizes)} references were given and the model takes {most}: leave some out")
    for number, (width, height) in enumerate(sizes, start=1):
        if min(width, height) < MIN_SIDE:
            raise InputError(f"reference {number} is {width} by {height} pixels: both sides need {MIN_SIDE} or more")
        if max(width, height) > MAX_RATIO * min(width, height):
            raise InputError(f"reference {number} is {width} by {height} pixels: crop it to {MAX_RATIO} to 1 or less")
    area = area_for(len(sizes))
    drawn = tokens_of(output)
    seen = sum(tokens_of(fitted_size(size, area)) for size in sizes)
    if drawn + seen > tokens:
        raise InputError(
            f"{output[0]} by {output[1]} pixels are {drawn} tokens, the references {seen}, and {tokens} fit in all: "
            "draw smaller, or give fewer or smaller references"
        )


def prepare_references(images: Sequence[Image.Image], area: int | None = None) -> list[Image.Image]:
    """Each scaled down into `area` pixels if it is larger, then cropped around its middle to whole tokens, as RGB.

    area: None takes what the release does, which depends on how many there are.
    """
    area = area_for(len(images)) if area is None else area
    return [crop_to_multiple(cap_area(image.convert("RGB"), area)) for image in images]


def area_for(count: int) -> int:
    """The pixels that are seen of each of so many references."""
    return ONE_AREA if count == 1 else SEVERAL_AREA


def fitted_size(size: Size, area: int) -> Size:
    """The size `prepare_references` gives a picture of that size."""
    width, height = _capped(size, area)
    return width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE


def default_size(first: Size) -> Size:
    """The size to draw at where none is asked for: the first reference's, in one megapixel."""
    return fitted_size(first, SEVERAL_AREA)


def tokens_of(size: Size) -> int:
    """Tokens of a picture of that size."""
    return (size[0] // MULTIPLE) * (size[1] // MULTIPLE)


def cap_area(image: Image.Image, area: int) -> Image.Image:
    """The picture, scaled down if it has more pixels than `area`, never up."""
    size = _capped(image.size, area)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def crop_to_multiple(image: Image.Image) -> Image.Image:
    """The middle of the picture, both sides floored to the multiple."""
    width, height = (side // MULTIPLE * MULTIPLE for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def join_references(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures from left to right on white, each half way up: what a language model is shown of them."""
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
