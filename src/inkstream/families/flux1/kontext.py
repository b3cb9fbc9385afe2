"""Kontext's reference picture, scaled to one of the 17 sizes that the model was trained on. Needs only PIL."""

from __future__ import annotations

from PIL import Image

MULTIPLE = 16
SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip
"""Width and height, from the tallest to the widest. Each has about one megapixel, and sides are multiples of 16."""


def kontext_size(width: int, height: int) -> tuple[int, int]:
    """The trained size of nearest width / height, for a reference, and by default for the drawing too.

    Both sides are first rounded down to multiples of 16, as in diffusers' FluxKontextPipeline. Shorter sides are kept.
    """
    ratio = _floored(width) / _floored(height)
    return min(SIZES, key=lambda size: (abs(ratio - size[0] / size[1]), size))


def prepare_reference(image: Image.Image) -> Image.Image:
    """The picture as RGB, scaled to its trained size. It is stretched to that shape, not cropped."""
    return image.convert("RGB").resize(kontext_size(*image.size), Image.Resampling.LANCZOS)


def _floored(side: int) -> int:
    return side // MULTIPLE * MULTIPLE or side
