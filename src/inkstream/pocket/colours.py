"""Twelve named colours, and the conversion to CIE Lab for colour distances."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 38),
    "orange": (248, 136, 20),
    "yellow": (255, 220, 40),
    "green": (40, 150, 60),
    "cyan": (50, 200, 216),
    "blue": (32, 92, 216),
    "purple": (142, 48, 160),
    "pink": (252, 150, 196),
    "brown": (122, 74, 38),
    "black": (20, 20, 22),
    "gray": (136, 138, 142),
    "white": (252, 252, 252),
}
"""sRGB values. Any two colours are at least 38 apart in Lab, so the nearest name is unambiguous."""

_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


@lru_cache(maxsize=1)
def _linear_light() -> NDArray[np.float32]:
    c = np.arange(256) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4).astype(np.float32)


def lab(rgb: ArrayLike) -> NDArray[np.float32]:
    """Convert sRGB values in 0..255 to CIE Lab (D65). rgb: (..., 3). Returns (..., 3) float32."""
    light = _linear_light()[np.clip(np.rint(np.asarray(rgb)), 0, 255).astype(np.uint8)]
    xyz = light @ (_XYZ / _WHITE[:, None]).T.astype(np.float32)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def nearest_colour(rgb: ArrayLike) -> str:
    """Return the name of the nearest colour in Lab. rgb: (3,) in 0..255."""
    names = list(COLOURS)
    return names[int(np.linalg.norm(_palette() - lab(rgb), axis=-1).argmin())]


@lru_cache(maxsize=1)
def _palette() -> NDArray[np.float32]:
    return lab(list(COLOURS.values()))
