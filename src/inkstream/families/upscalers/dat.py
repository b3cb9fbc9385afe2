"""DAT (Chen and others 2023): blocks that attend over places and over channels in turn, each beside a convolution."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families.upscalers.swinir import MEAN, Sides, conv, in_windows, last_number, pixel_shuffles
from inkstream.weights.keymap import Rule, drop

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class DATConfig:
    """Sizes of a DAT. split: height and width of a window; half of the channels has it turned. narrow: whether three
    convolutions stand for one; direct: whether the last layer makes pixels at once."""

    embed_dim: int = 180
    depths: tuple[int, ...] = (6,) * 6
    num_heads: tuple[int, ...] = (6,) * 6
    split: Sides = (8, 32)
    hidden: int = 720
    qkv_bias: bool = True
    upscale: int = 4
    num_feat: int = 64
    narrow: bool = False
    direct: bool = False


class DAT(nn.Module):
    def __init__(self, config: DATConfig):
        super().__init__()
        dim = config.embed_dim
        self.scale, self.direct = config.upscale, config.direct
        self.conv_first = conv(3, dim)
        self.before_RG = nn.ModuleDict({"1": nn.LayerNorm(dim)})
        self.layers = nn.ModuleList(Group(config, i) for i in range(len(config.depths)))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = residual_conv(config)
        if config.direct:
            self.upsample = nn.Sequential(conv(dim, 3 * config.upscale**2), nn.PixelShuffle(config.upscale))
        else:
            self.conv_before_upsample = nn.Sequential(conv(dim, config.num_feat), nn.LeakyReLU())
            self.upsample = pixel_shuffles(config.upscale, config.num_feat)
            self.conv_last = conv(config.num_feat, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, h, w) -> (B, 3, h * scale, w * scale)
        mean = torch.tensor(MEAN, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
        first = self.conv_first(x - mean)
        inner = self.before_RG["1"](first.movedim(1, -1))  # (B, h, w, C)
        for group in self.layers:
            inner = group(inner)
        inner = first + self.conv_after_body(self.norm(inner).movedim(-1, 1))
        if self.direct:
            return self.upsample(inner) + mean
        return self.conv_last(self.upsample(self.conv_before_upsample(inner))) + mean


class Group(nn.Module):
    """Blocks and a convolution in a residual."""

    def __init__(self, config: DATConfig, index: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, index, i) for i in range(config.depths[index]))
        self.conv = residual_conv(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        inner = x
        for block in self.blocks:
            inner = block(inner)
        return x + self.conv(inner.movedim(-1, 1)).movedim(1, -1)


class Block(nn.Module):
    """Attention and a gated MLP, each after a norm and in a residual. Even blocks attend over places."""

    def __init__(self, config: DATConfig, group: int, index: int):
        super().__init__()
        heads = config.num_heads[group]
        shifted = (index % 4 == 2) if group % 2 == 0 else (index % 4 == 0)
        self.norm1 = nn.LayerNorm(config.embed_dim)
        self.attn = ChannelAttention(config, heads) if index % 2 else PlaceAttention(config, heads, shifted)
        self.norm2 = nn.LayerNorm(config.embed_dim)
        self.ffn = GatedMLP(config.embed_dim, config.hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Gated(nn.Module):
    """What both kinds of attention have: projections, and a convolution of the values beside them, with two gates."""

    def __init__(self, config: DATConfig):
        super().__init__()
        dim = config.embed_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwconv = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU())
        self.channel_interaction = nn.Sequential(nn.AdaptiveAvgPool2d(1), *gate(dim, dim // 8, dim))
        self.spatial_interaction = nn.Sequential(*gate(dim, dim // 16, 1))


class PlaceAttention(Gated):
    """Attention in windows: one half of the channels in upright ones, the other in turned ones."""

    qkv: nn.Linear
    proj: nn.Linear
    dwconv: nn.Sequential
    channel_interaction: nn.Sequential
    spatial_interaction: nn.Sequential

    def __init__(self, config: DATConfig, heads: int, shifted: bool):
        super().__init__(config)
        high, wide = config.split
        self.windows: list[Sides] = [(high, wide), (wide, high)]
        self.shifted = shifted
        self.attns = nn.ModuleList(WindowAttention(config.embed_dim // 2, heads // 2, side) for side in self.windows)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        height, width = x.shape[1:3]
        qkv = self.qkv(x)
        beside = self.dwconv(qkv.chunk(3, -1)[2].movedim(-1, 1))
        side = max(self.windows[0])
        qkv = F.pad(qkv, (0, 0, 0, -width % side, 0, -height % side))
        halves = [torch.cat(pieces, -1) for pieces in zip(*(one.chunk(2, -1) for one in qkv.chunk(3, -1)))]
        shifts = [(high // 2, wide // 2) if self.shifted else (0, 0) for high, wide in self.windows]
        parts = [in_windows(*given) for given in zip(self.attns, halves, self.windows, shifts)]
        seen = torch.cat(parts, -1)[:, :height, :width].movedim(-1, 1)
        channels, places = self.channel_interaction(beside), self.spatial_interaction(seen)
        out = seen * channels.sigmoid() + beside * places.sigmoid()
        return self.proj(out.movedim(1, -1))


class ChannelAttention(Gated):
    """Each channel of a head attends to the others, by their products over all places of the picture."""

    qkv: nn.Linear
    proj: nn.Linear
    dwconv: nn.Sequential
    channel_interaction: nn.Sequential
    spatial_interaction: nn.Sequential

    def __init__(self, config: DATConfig, heads: int):
        super().__init__(config)
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        qkv = self.qkv(x)
        beside = self.dwconv(qkv.chunk(3, -1)[2].movedim(-1, 1))
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)  # (B, H, E, L)
        share = ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * self.temperature).softmax(-1)
        seen = (share @ v).flatten(1, 2).unflatten(-1, x.shape[1:3])  # (B, C, h, w)
        channels, places = self.channel_interaction(seen), self.spatial_interaction(beside)
        out = seen * places.sigmoid() + beside * channels.sigmoid()
        return self.proj(out.movedim(1, -1))


class WindowAttention(nn.Module):
    """Attention inside each window, with a bias that a small network computes from two places' distance."""

    rpe_biases: Tensor
    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: Sides):
        super().__init__()
        high, wide = window
        self.heads = heads
        self.pos = DistanceBias(dim // 16, heads)
        self.register_buffer("rpe_biases", torch.zeros((2 * high - 1) * (2 * wide - 1), 2))  # files hold both
        self.register_buffer("relative_position_index", torch.zeros(high * wide, high * wide))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (B, windows, L, 3C) -> (B, windows, L, C)
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)  # (B, windows, H, L, E)
        bias = self.pos(self.rpe_biases)[self.relative_position_index.long()].movedim(-1, 0)  # (H, L, L)
        if mask is not None:
            bias = bias + mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(*q.shape[:-1], -1))
        return out.transpose(-2, -3).flatten(-2)


class DistanceBias(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.pos_proj = nn.Linear(2, dim)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, out)) for out in (dim, dim, heads)
        )

    def forward(self, x: Tensor) -> Tensor:  # (places, 2) -> (places, H)
        return self.pos3(self.pos2(self.pos1(self.pos_proj(x))))


class GatedMLP(nn.Module):
    """An MLP in which a convolution of one half of the hidden channels gates the other."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        half = hidden // 2
        self.fc1 = nn.Linear(dim, hidden)
        depthwise = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.sg = nn.ModuleDict({"norm": nn.LayerNorm(half), "conv": depthwise})
        self.fc2 = nn.Linear(half, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        kept, gating = F.gelu(self.fc1(x)).chunk(2, -1)
        return self.fc2(kept * self.sg["conv"](self.sg["norm"](gating).movedim(-1, 1)).movedim(1, -1))


def gate(dim: int, narrow: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, narrow, 1), nn.BatchNorm2d(narrow), nn.GELU(), nn.Conv2d(narrow, out, 1)]


def residual_conv(config: DATConfig) -> nn.Module:
    dim, narrow = config.embed_dim, config.embed_dim // 4
    if not config.narrow:
        return conv(dim, dim)
    first, second = nn.LeakyReLU(0.2), nn.LeakyReLU(0.2)
    return nn.Sequential(conv(dim, narrow), first, nn.Conv2d(narrow, narrow, 1), second, conv(narrow, dim))


# Files ----------------------------------------------------------------------------------------------------------------


def is_dat(shapes: Shapes) -> bool:
    return {"before_RG.1.weight", "layers.0.blocks.0.attn.attns.0.rpe_biases"} <= shapes.keys()


def rules_of(shapes: Shapes) -> Sequence[Rule]:
    return tuple(drop(f"layers.{{}}.blocks.{{}}.attn.attn_mask_{i}") for i in (0, 1))  # they follow from the sizes


def infer(shapes: Shapes) -> DATConfig:
    group, first = "layers.{}.blocks", "layers.0.blocks.0"
    groups = last_number(r"layers\.(\d+)\.", shapes) + 1
    factors = [shape[0] // shape[1] for name, shape in shapes.items() if re.fullmatch(r"upsample\.\d+\.weight", name)]
    direct = "conv_last.weight" not in shapes
    scale = math.isqrt(shapes["upsample.0.weight"][0] // 3) if direct else math.isqrt(math.prod(factors))
    return DATConfig(
        embed_dim=shapes["conv_first.weight"][0],
        depths=tuple(last_number(rf"layers\.{i}\.blocks\.(\d+)\.", shapes) + 1 for i in range(groups)),
        num_heads=tuple(2 * shapes[f"{group.format(i)}.0.attn.attns.0.pos.pos3.2.weight"][0] for i in range(groups)),
        split=split_of(
            shapes[f"{first}.attn.attns.0.relative_position_index"][0], shapes[f"{first}.attn.attns.0.rpe_biases"][0]
        ),
        hidden=shapes[f"{first}.ffn.fc1.weight"][0],
        qkv_bias=f"{first}.attn.qkv.bias" in shapes,
        upscale=scale,
        num_feat=64 if direct else shapes["conv_last.weight"][1],
        narrow="conv_after_body.weight" not in shapes,
        direct=direct,
    )


def split_of(area: int, distances: int) -> Sides:
    """The height and the width of a window with so many places and distances. The smaller side is the height."""
    both = (4 * area + 1 - distances) // 2  # (2h - 1)(2w - 1) = 4hw - 2(h + w) + 1
    difference = math.isqrt(both**2 - 4 * area)
    return (both - difference) // 2, (both + difference) // 2
