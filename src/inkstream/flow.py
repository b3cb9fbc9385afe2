"""The one convention: `x_t = (1 - t) * image + t * noise`, t from 1 (noise) to 0, `v = noise - image`, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def add_noise(image: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """Return the point at time t on the straight path from image to noise. t broadcasts against both tensors."""
    return (1 - t) * image + t * noise


def to_image(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """Return the clean image that the velocity v at point x and time t points to."""
    return x - t * v
