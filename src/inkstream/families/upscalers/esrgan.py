"""ESRGAN (Wang and others 2018) and Real-ESRGAN: residual-in-residual dense blocks, then nearest-neighbour upsampling.

Names are those of Real-ESRGAN's releases. ESRGAN's first releases number the layers of nested sequences instead, and
BSRGAN has names of its own. ESRGAN+ (Rakotonirina and Rasoanaivo 2020) adds a 1 x 1 convolution to each dense block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.weights.keymap import Rule, rename

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RRDBConfig:
    """Sizes of an RRDBNet. unshuffle: blocks of so many pixels a side become channels before the first layer."""

    num_feat: int = 64
    num_grow_ch: int = 32
    num_block: int = 23
    doublings: int = 2
    unshuffle: int = 1
    plus: bool = False


class RRDBNet(nn.Module):
    def __init__(self, config: RRDBConfig):
        super().__init__()
        width = config.num_feat
        self.unshuffle = config.unshuffle
        self.scale = 2**config.doublings // config.unshuffle
        self.conv_first = conv(3 * config.unshuffle**2, width)
        self.body = nn.ModuleList(RRDB(width, config.num_grow_ch, config.plus) for _ in range(config.num_block))
        self.conv_body = conv(width, width)
        self.conv_up = nn.ModuleList(conv(width, width) for _ in range(config.doublings))
        self.conv_hr = conv(width, width)
        self.conv_last = conv(width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, h, w) -> (B, 3, h * scale, w * scale)
        height, width = x.shape[2:]
        if self.unshuffle > 1:
            x = F.pad(x, (0, -width % self.unshuffle, 0, -height % self.unshuffle), "replicate")
            x = F.pixel_unshuffle(x, self.unshuffle)
        x = first = self.conv_first(x)
        for block in self.body:
            x = block(x)
        x = first + self.conv_body(x)
        for layer in self.conv_up:
            x = lrelu(layer(F.interpolate(x, scale_factor=2.0)))
        x = self.conv_last(lrelu(self.conv_hr(x)))
        return x[:, :, : height * self.scale, : width * self.scale]


class RRDB(nn.Module):
    """Three dense blocks in a residual."""

    def __init__(self, width: int, growth: int, plus: bool):
        super().__init__()
        self.rdb1 = DenseBlock(width, growth, plus)
        self.rdb2 = DenseBlock(width, growth, plus)
        self.rdb3 = DenseBlock(width, growth, plus)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class DenseBlock(nn.Module):
    """Five convolutions, each of the input and all results before it, in a residual."""

    def __init__(self, width: int, growth: int, plus: bool):
        super().__init__()
        self.conv1x1 = nn.Conv2d(width, growth, 1, bias=False) if plus else None
        self.conv1 = conv(width, growth)
        self.conv2 = conv(width + growth, growth)
        self.conv3 = conv(width + 2 * growth, growth)
        self.conv4 = conv(width + 3 * growth, growth)
        self.conv5 = conv(width + 4 * growth, width)

    def forward(self, x: Tensor) -> Tensor:
        x1 = lrelu(self.conv1(x))
        x2 = lrelu(self.conv2(torch.cat((x, x1), 1)))
        if self.conv1x1 is not None:
            x2 = x2 + self.conv1x1(x)
        x3 = lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        if self.conv1x1 is not None:
            x4 = x4 + x2
        return x + 0.2 * self.conv5(torch.cat((x, x1, x2, x3, x4), 1))


def conv(width_in: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, padding=1)


def lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


# Files ----------------------------------------------------------------------------------------------------------------


def is_esrgan(shapes: Shapes) -> bool:
    first = ("model.1.sub.0.RDB1.conv1.0.weight", "RRDB_trunk.0.RDB1.conv1.weight", "body.0.rdb1.conv1.weight")
    return any(name in shapes for name in first)


def rules_of(shapes: Shapes) -> Sequence[Rule]:
    """The rules into our names. Our upsampling layers are a list: conv_up1 and upconv1 are `conv_up.0`."""
    if "model.0.weight" in shapes:
        return _numbered(shapes)
    dense = [rename(f"RRDB_trunk.{{}}.RDB{i}", f"body.{{}}.rdb{i}") for i in (1, 2, 3)]
    upsampling = [rename(f"{name}{i}", f"conv_up.{i - 1}") for name in ("conv_up", "upconv") for i in (1, 2, 3)]
    return (*dense, *upsampling, rename("trunk_conv", "conv_body"), rename("HRconv", "conv_hr"))


def _numbered(shapes: Shapes) -> Sequence[Rule]:
    """The rules for nested sequences: model.1.sub holds the blocks and conv_body, then come a layer every third."""
    last, blocks = _last(r"model\.(\d+)\.", shapes), _last(r"model\.1\.sub\.(\d+)\.", shapes)
    layers = [
        rename(f"model.1.sub.{{}}.RDB{i}.conv{j}.0", f"body.{{}}.rdb{i}.conv{j}")
        for i in (1, 2, 3)
        for j in range(1, 6)
    ]
    layers += [rename(f"model.1.sub.{{}}.RDB{i}.conv1x1", f"body.{{}}.rdb{i}.conv1x1") for i in (1, 2, 3)]
    doublings = [rename(f"model.{3 * i}", f"conv_up.{i - 1}") for i in range(1, (last - 4) // 3 + 1)]
    return (
        *layers,
        rename(f"model.1.sub.{blocks}", "conv_body"),
        rename("model.0", "conv_first"),
        *doublings,
        rename(f"model.{last - 2}", "conv_hr"),
        rename(f"model.{last}", "conv_last"),
    )


def infer(shapes: Shapes) -> RRDBConfig:
    width, channels = shapes["conv_first.weight"][:2]
    unshuffle = math.isqrt(channels // 3)
    if 3 * unshuffle**2 != channels or unshuffle not in (1, 2, 4):
        raise ValueError(f"{channels} channels are not the three of a picture")
    return RRDBConfig(
        num_feat=width,
        num_grow_ch=shapes["body.0.rdb1.conv1.weight"][0],
        num_block=_last(r"body\.(\d+)\.", shapes) + 1,
        doublings=_last(r"conv_up\.(\d+)\.", shapes) + 1,
        unshuffle=unshuffle,
        plus="body.0.rdb1.conv1x1.weight" in shapes,
    )


def _last(pattern: str, names: Iterable[str]) -> int:
    """The largest number that the pattern finds; -1 if there is none."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
