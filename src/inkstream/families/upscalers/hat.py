"""HAT (Chen and others 2023): SwinIR's blocks with channel attention beside, and overlapping windows in each group."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families.upscalers.swinir import (
    MEAN,
    MLP,
    WindowAttention,
    conv,
    cut,
    in_windows,
    joined,
    last_number,
    pad,
    pixel_shuffles,
    places,
)
from inkstream.weights.keymap import Rule, drop

Shapes = Mapping[str, tuple[int, ...]]
CONV_SCALE = 0.01
"""Share of the channel attention. All published models have it."""


@dataclass(frozen=True)
class HATConfig:
    """Sizes of a HAT. wide: the side of the overlapping windows; compressed, squeezed: widths of channel attention."""

    embed_dim: int = 180
    depths: tuple[int, ...] = (6,) * 6
    num_heads: tuple[int, ...] = (6,) * 6
    window_size: int = 16
    wide: int = 24
    compressed: int = 60
    squeezed: int = 6
    hidden: int = 360
    upscale: int = 4
    num_feat: int = 64


class HAT(nn.Module):
    def __init__(self, config: HATConfig):
        super().__init__()
        self.window, self.scale = config.window_size, config.upscale
        dim = config.embed_dim
        self.conv_first = conv(3, dim)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})
        self.layers = nn.ModuleList(Group(config, i) for i in range(len(config.depths)))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = conv(dim, dim)
        self.conv_before_upsample = nn.Sequential(conv(dim, config.num_feat), nn.LeakyReLU())
        self.upsample = pixel_shuffles(config.upscale, config.num_feat)
        self.conv_last = conv(config.num_feat, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, h, w) -> (B, 3, h * scale, w * scale)
        height, width = x.shape[2:]
        mean = torch.tensor(MEAN, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
        first = self.conv_first(pad(x, self.window) - mean)
        inner = self.patch_embed["norm"](first.movedim(1, -1))  # (B, h, w, C)
        for group in self.layers:
            inner = group(inner)
        inner = first + self.conv_after_body(self.norm(inner).movedim(-1, 1))
        out = self.conv_last(self.upsample(self.conv_before_upsample(inner))) + mean
        return out[:, :, : height * self.scale, : width * self.scale]


class Group(nn.Module):
    """Blocks, a block with overlapping windows, and a convolution, in a residual."""

    def __init__(self, config: HATConfig, index: int):
        super().__init__()
        heads, shift = config.num_heads[index], config.window_size // 2
        self.residual_group = nn.ModuleDict({
            "blocks": nn.ModuleList(Block(config, heads, i % 2 * shift) for i in range(config.depths[index])),
            "overlap_attn": OverlapBlock(config, heads),
        })  # fmt: skip
        self.conv = conv(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        inner = x
        for block in self.residual_group["blocks"]:  # type: ignore[union-attr]
            inner = block(inner)
        inner = self.residual_group["overlap_attn"](inner)
        return x + self.conv(inner.movedim(-1, 1)).movedim(1, -1)


class Block(nn.Module):
    """Attention in windows beside channel attention, then an MLP."""

    def __init__(self, config: HATConfig, heads: int, shift: int):
        super().__init__()
        dim = config.embed_dim
        self.shift, self.window = (shift, shift), (config.window_size, config.window_size)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, config.window_size)
        channels = ChannelAttention(dim, config.squeezed)
        cab = nn.Sequential(conv(dim, config.compressed), nn.GELU(), conv(config.compressed, dim), channels)
        self.conv_block = nn.ModuleDict({"cab": cab})
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, config.hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        normed = self.norm1(x)
        beside = self.conv_block["cab"](normed.movedim(-1, 1)).movedim(1, -1)
        x = x + in_windows(self.attn, normed, self.window, self.shift) + CONV_SCALE * beside
        return x + self.mlp(self.norm2(x))


class ChannelAttention(nn.Module):
    """A gate for each channel, from its mean over the whole picture."""

    def __init__(self, dim: int, squeezed: int):
        super().__init__()
        layers = nn.Conv2d(dim, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, dim, 1), nn.Sigmoid()
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class OverlapBlock(nn.Module):
    """Each window attends to a wider one around it. Then an MLP."""

    def __init__(self, config: HATConfig, heads: int):
        super().__init__()
        dim = config.embed_dim
        self.heads, self.window, self.wide = heads, config.window_size, config.wide
        self.relative_position_bias_table = nn.Parameter(torch.zeros((self.window + self.wide - 1) ** 2, heads))
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, config.hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        height, width = x.shape[1:3]
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q = (
            cut(q, (self.window, self.window)).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        )  # (B, windows, H, L, E)
        around = torch.cat((k, v), -1).movedim(-1, 1)
        padding = (self.wide - self.window) // 2
        pieces = F.unfold(around, self.wide, padding=padding, stride=self.window)  # (B, 2C * wide * wide, windows)
        k, v = pieces.unflatten(1, (2, self.heads, q.shape[-1], -1)).permute(1, 0, 5, 2, 4, 3)
        bias = self.relative_position_bias_table[offsets(self.window, self.wide).to(x.device)].movedim(-1, 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(*q.shape[:-1], -1))
        out = joined(out.transpose(-2, -3).flatten(-2), height, width, (self.window, self.window))
        x = x + self.proj(out)
        return x + self.mlp(self.norm2(x))


def offsets(window: int, wide: int) -> Tensor:
    """(window * window, wide * wide): the row of the bias table. Rows below 0 count from the table's end."""
    rows, columns = (there - own[:, None] + window - wide + 1 for own, there in zip(places(window), places(wide)))
    return rows * (window + wide - 1) + columns


# Files ----------------------------------------------------------------------------------------------------------------


def is_hat(shapes: Shapes) -> bool:
    return "layers.0.residual_group.blocks.0.conv_block.cab.0.weight" in shapes and "conv_after_body.weight" in shapes


def rules_of(shapes: Shapes) -> Sequence[Rule]:
    return drop("relative_position_index_SA"), drop("relative_position_index_OCA"), drop("attn_mask")


def infer(shapes: Shapes) -> HATConfig:
    group = "layers.{}.residual_group"
    block, overlap = f"{group.format(0)}.blocks.0", f"{group}.overlap_attn.relative_position_bias_table"
    groups = last_number(r"layers\.(\d+)\.", shapes) + 1
    window = (math.isqrt(shapes[f"{block}.attn.relative_position_bias_table"][0]) + 1) // 2
    factors = [shape[0] // shape[1] for name, shape in shapes.items() if re.fullmatch(r"upsample\.\d+\.weight", name)]
    return HATConfig(
        embed_dim=shapes["conv_first.weight"][0],
        depths=tuple(last_number(rf"layers\.{i}\.residual_group\.blocks\.(\d+)\.", shapes) + 1 for i in range(groups)),
        num_heads=tuple(shapes[overlap.format(i)][1] for i in range(groups)),
        window_size=window,
        wide=math.isqrt(shapes[overlap.format(0)][0]) + 1 - window,
        compressed=shapes[f"{block}.conv_block.cab.0.weight"][0],
        squeezed=shapes[f"{block}.conv_block.cab.3.attention.1.weight"][0],
        hidden=shapes[f"{block}.mlp.fc1.weight"][0],
        upscale=math.isqrt(math.prod(factors)),
        num_feat=shapes["conv_last.weight"][1],
    )
