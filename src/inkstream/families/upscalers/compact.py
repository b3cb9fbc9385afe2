"""Compact (SRVGGNetCompact), the small network of Real-ESRGAN's general and video models: convolutions, then pixels.

All layers work at the size of the input. The result is added to the input, enlarged by nearest neighbour.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CompactConfig:
    """Sizes of an SRVGGNetCompact."""

    num_feat: int = 64
    num_conv: int = 16
    upscale: int = 4


class SRVGGNetCompact(nn.Module):
    def __init__(self, config: CompactConfig):
        super().__init__()
        width = config.num_feat
        self.scale = config.upscale
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.PReLU(width)]
        for _ in range(config.num_conv):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.ModuleList([*layers, nn.Conv2d(width, 3 * config.upscale**2, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, h, w) -> (B, 3, h * scale, w * scale)
        out = x
        for layer in self.body:
            out = layer(out)
        return F.pixel_shuffle(out, self.scale) + F.interpolate(x, scale_factor=float(self.scale))


def is_compact(shapes: Shapes) -> bool:
    """Whether all names are numbered layers of one list, and the second is an activation's."""
    return all(re.fullmatch(r"body\.\d+\.(weight|bias)", name) for name in shapes) and len(
        shapes.get("body.1.weight", (0, 0))
    ) == 1  # fmt: skip


def infer(shapes: Shapes) -> CompactConfig:
    width, channels = shapes["body.0.weight"][:2]
    last = max(int(name.split(".")[1]) for name in shapes)
    scale = math.isqrt(shapes[f"body.{last}.weight"][0] // 3)
    if channels != 3 or 3 * scale**2 != shapes[f"body.{last}.weight"][0]:
        raise ValueError("it does not read and write three channels")
    return CompactConfig(num_feat=width, num_conv=(last - 2) // 2, upscale=scale)
