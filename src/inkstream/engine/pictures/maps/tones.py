"""Maps of tones and colours: the picture with less in it."""

from __future__ import annotations

from PIL import Image, ImageFilter

SIDE = 512
"""The shorter side at which `sigma` is given in pixels."""


def blur(picture: Image.Image, sigma: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(sigma * min(picture.size) / SIDE))


def tile(picture: Image.Image, factor: float) -> Image.Image:
    """The picture `factor` times smaller, and back at its size."""
    small = (max(1, round(picture.width / factor)), max(1, round(picture.height / factor)))
    return picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def colour(picture: Image.Image, cells: float) -> Image.Image:
    """A grid of squares, each with the mean colour of its place."""
    side = max(1.0, min(picture.size) / round(cells))
    grid = (max(1, round(picture.width / side)), max(1, round(picture.height / side)))
    return picture.resize(grid, Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)
