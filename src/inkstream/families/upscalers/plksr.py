"""PLKSR (Lee and others 2024) and RealPLKSR: blocks with a large kernel over a part of the channels, then pixels.

The result is added to the input, each pixel repeated. RealPLKSR has another activation and a norm in each block. Some
of its files sample their pixels at learnt places (DySample, Liu and others 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PLKSRConfig:
    """Sizes of a PLKSR. mixer: the kernels of the two convolutions that mix channels; part: channels of the large one.

    norm: none, or of RealPLKSR `group` or `layer`.
    """

    dim: int = 64
    n_blocks: int = 28
    scale: int = 4
    kernel_size: int = 17
    part: int = 16
    mixer: tuple[int, int] = (3, 1)
    attention: bool = True
    norm: str = ""
    samples: bool = False


class PLKSR(nn.Module):
    def __init__(self, config: PLKSRConfig):
        super().__init__()
        self.scale, pixels = config.scale, 3 * config.scale**2
        blocks = [Block(config) for _ in range(config.n_blocks)]
        gap = [nn.Identity()] if config.norm else []  # RealPLKSR has dropout there
        last = nn.Conv2d(config.dim, pixels, 3, padding=1)
        self.feats = nn.Sequential(nn.Conv2d(3, config.dim, 3, padding=1), *blocks, *gap, last)
        self.to_img = DySample(pixels, config.scale) if config.samples else nn.PixelShuffle(config.scale)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, h, w) -> (B, 3, h * scale, w * scale)
        return self.to_img(self.feats(x) + x.repeat_interleave(self.scale**2, dim=1))


class Block(nn.Module):
    def __init__(self, config: PLKSRConfig):
        super().__init__()
        dim, real = config.dim, bool(config.norm)
        first, second = config.mixer
        layers = (
            nn.Conv2d(dim, 2 * dim, first, padding=first // 2),
            nn.Conv2d(2 * dim, dim, second, padding=second // 2),
        )
        mixer = nn.Sequential(layers[0], nn.Mish() if real else nn.GELU(), layers[1])
        self.add_module("channel_mixer" if real else "channe_mixer", mixer)  # the release's spelling
        self.mixer = "channel_mixer" if real else "channe_mixer"
        self.layer_norm = LayerNorm(dim) if config.norm == "layer" else nn.Identity()
        self.lk = LargeKernel(config.part, config.kernel_size)
        self.attn = Attention(dim) if config.attention else nn.Identity()
        self.refine = nn.Conv2d(dim, dim, 1)
        self.norm = nn.GroupNorm(4, dim) if config.norm == "group" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.lk(self.get_submodule(self.mixer)(self.layer_norm(x)))
        return x + self.norm(self.refine(self.attn(inner)))


class LayerNorm(nn.Module):
    """Norms the channels of each pixel."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6).movedim(-1, 1)


class LargeKernel(nn.Module):
    """A convolution of the first channels. The others pass."""

    def __init__(self, part: int, kernel: int):
        super().__init__()
        self.part = part
        self.conv = nn.Conv2d(part, part, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.conv(x[:, : self.part]), x[:, self.part :]), 1)


class Attention(nn.Module):
    """A gate for each element."""

    def __init__(self, dim: int):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.f(x)


class DySample(nn.Module):
    """Enlarges by sampling the input at learnt offsets from the usual places, in groups of channels."""

    init_pos: Tensor

    def __init__(self, channels: int, scale: int):
        super().__init__()
        self.scale = scale
        self.groups = 3 if scale % 2 else 4
        offsets = 2 * self.groups * scale**2
        self.end_conv = nn.Conv2d(channels, 3, 1) if scale != 1 else None
        self.offset = nn.Conv2d(channels, offsets, 1)
        self.scope = nn.Conv2d(channels, offsets, 1, bias=False)
        self.register_buffer("init_pos", torch.zeros(1, offsets, 1, 1))  # files hold it

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, 3, h * scale, w * scale)
        height, width = x.shape[2:]
        offset = self.offset(x) * self.scope(x).sigmoid() * 0.5 + self.init_pos
        offset = F.pixel_shuffle(offset, self.scale).unflatten(1, (2, self.groups))  # across and down, for each group
        across = (torch.arange(width, device=x.device, dtype=x.dtype) + 0.5).repeat_interleave(self.scale)
        down = (torch.arange(height, device=x.device, dtype=x.dtype) + 0.5).repeat_interleave(self.scale)
        places = torch.stack(((offset[:, 0] + across) / width, (offset[:, 1] + down[:, None]) / height), -1) * 2 - 1
        pieces = x.unflatten(1, (self.groups, -1)).flatten(0, 1)
        sampled = F.grid_sample(pieces, places.flatten(0, 1), padding_mode="border", align_corners=False)
        sampled = sampled.unflatten(0, (-1, self.groups)).flatten(1, 2)
        return sampled if self.end_conv is None else self.end_conv(sampled)


# Files ----------------------------------------------------------------------------------------------------------------


def is_plksr(shapes: Shapes) -> bool:
    mixers = ("feats.1.channe_mixer.0.weight", "feats.1.channel_mixer.0.weight")
    return {"feats.0.weight", "feats.1.lk.conv.weight"} <= shapes.keys() and any(name in shapes for name in mixers)


def infer(shapes: Shapes) -> PLKSRConfig:
    real = "feats.1.channel_mixer.0.weight" in shapes
    mixer = "feats.1.channel_mixer" if real else "feats.1.channe_mixer"
    last = max(int(name.split(".")[1]) for name in shapes if name.startswith("feats."))
    part, _, kernel, _ = shapes["feats.1.lk.conv.weight"]
    return PLKSRConfig(
        dim=shapes["feats.0.weight"][0],
        n_blocks=last - (2 if real else 1),
        scale=math.isqrt(shapes[f"feats.{last}.weight"][0] // 3),
        kernel_size=kernel,
        part=part,
        mixer=(shapes[f"{mixer}.0.weight"][2], shapes[f"{mixer}.2.weight"][2]),
        attention="feats.1.attn.f.0.weight" in shapes,
        norm=("layer" if "feats.1.layer_norm.weight" in shapes else "group") if real else "",
        samples="to_img.init_pos" in shapes,
    )
