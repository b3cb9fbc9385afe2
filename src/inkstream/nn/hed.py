"""Holistically-nested edge detection (Xie and Tu 2015): VGG16 with a side output at each of its five scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Of each scale: the width, and the number of convolutions."""
MEAN = (104.00699, 116.66877, 122.67892)
"""Mean of blue, green and red, which is subtracted from pixels in [0, 255]."""


class HED(nn.Module):
    """Pixels (B, 3, H, W), RGB in [0, 255] -> the probability of an edge (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(width for width, _ in WIDTHS)]
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(before if i == 0 else width, width, 3, padding=1) for i in range(count))
            for before, (width, count) in zip(widths, WIDTHS)
        )
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, 1) for width, _ in WIDTHS)
        self.fuse = nn.Conv2d(len(WIDTHS), 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        x = x.flip(1) - torch.tensor(MEAN, device=x.device).view(1, 3, 1, 1)
        sides: list[Tensor] = []
        for scale, (block, side) in enumerate(zip(self.blocks, self.sides)):
            x = F.max_pool2d(x, 2, ceil_mode=True) if scale else x
            for conv in block:  # type: ignore[union-attr]
                x = F.relu(conv(x), inplace=True)
            sides.append(F.interpolate(side(x), size=size, mode="bilinear"))
        return self.fuse(torch.cat(sides, dim=1)).sigmoid()
