"""The one convention: `x_t = (1 - t) * image + t * noise`, t from 1 (noise) to 0, `v = noise - image`, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def add_noise(image: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """The point at time t of the straight path from image to noise. t broadcasts against both."""
    return (1 - t) * image + t * noise


def to_image(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """The clean image that velocity v at point x, time t, points at."""
    return x - t * v


def to_noise(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """The pure noise that velocity v at point x, time t, comes from."""
    return x + (1 - t) * v
