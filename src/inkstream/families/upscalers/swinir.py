"""SwinIR (Liang and others 2021): groups of transformer blocks with attention in shifted windows, then an upsampler."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.weights.keymap import Rule, drop, rename

Shapes = Mapping[str, tuple[int, ...]]
UpsamplerName = Literal["nearest+conv", "pixelshuffle", "pixelshuffledirect", ""]
MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of red, green and blue in DIV2K."""
Sides = tuple[int, int]
"""Height and width of a window, or of its shift."""


@dataclass(frozen=True)
class SwinIRConfig:
    """Sizes of a SwinIR. depths, num_heads: of each group. upscale: before `unshuffle`, which makes blocks of pixels
    channels. img_range: the factor of pixels in [0, 1]."""

    embed_dim: int = 180
    depths: tuple[int, ...] = (6,) * 6
    num_heads: tuple[int, ...] = (6,) * 6
    window_size: int = 8
    hidden: int = 360
    upscale: int = 4
    upsampler: UpsamplerName = "nearest+conv"
    resi_connection: Literal["1conv", "3conv"] = "1conv"
    num_feat: int = 64
    unshuffle: int = 1
    img_range: float = 1.0


class SwinIR(nn.Module):
    def __init__(self, config: SwinIRConfig):
        super().__init__()
        self.config = config
        self.scale = config.upscale // config.unshuffle
        dim = config.embed_dim
        self.conv_first = conv(3 * config.unshuffle**2, dim)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})
        self.layers = nn.ModuleList(Group(config, i) for i in range(len(config.depths)))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = residual_conv(config)
        if config.upsampler in ("pixelshuffle", "nearest+conv"):
            self.conv_before_upsample = nn.Sequential(conv(dim, config.num_feat), nn.LeakyReLU())
        if config.upsampler == "pixelshuffle":
            self.upsample = pixel_shuffles(config.upscale, config.num_feat)
        elif config.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(conv(dim, 3 * config.upscale**2), nn.PixelShuffle(config.upscale))
        elif config.upsampler == "nearest+conv":
            self.conv_up = nn.ModuleList(
                conv(config.num_feat, config.num_feat) for _ in range(config.upscale.bit_length() - 1)
            )
            self.conv_hr = conv(config.num_feat, config.num_feat)
        if config.upsampler != "pixelshuffledirect":
            self.conv_last = conv(config.num_feat if config.upsampler else dim, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, h, w) -> (B, 3, h * scale, w * scale)
        config, (height, width) = self.config, x.shape[2:]
        x = pad(x, config.window_size * config.unshuffle)
        mean = torch.tensor(MEAN, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
        x = (x - mean) * config.img_range
        first = self.conv_first(F.pixel_unshuffle(x, config.unshuffle) if config.unshuffle > 1 else x)
        inner = first + self.conv_after_body(self.body(first))
        if config.upsampler == "pixelshuffle":
            out = self.conv_last(self.upsample(self.conv_before_upsample(inner)))
        elif config.upsampler == "pixelshuffledirect":
            out = self.upsample(inner)
        elif config.upsampler == "nearest+conv":
            out = self.conv_before_upsample(inner)
            for layer in self.conv_up:
                out = F.leaky_relu(layer(F.interpolate(out, scale_factor=2.0)), 0.2)
            out = self.conv_last(F.leaky_relu(self.conv_hr(out), 0.2))
        else:
            out = x + self.conv_last(inner)
        return (out / config.img_range + mean)[:, :, : height * self.scale, : width * self.scale]

    def body(self, x: Tensor) -> Tensor:
        x = self.patch_embed["norm"](x.movedim(1, -1))  # (B, h, w, C) from here
        for group in self.layers:
            x = group(x)
        return self.norm(x).movedim(-1, 1)


class Group(nn.Module):
    """Blocks and a convolution in a residual. Every second block has shifted windows."""

    def __init__(self, config: SwinIRConfig, index: int):
        super().__init__()
        heads, window = config.num_heads[index], config.window_size
        self.residual_group = nn.ModuleDict({
            "blocks": nn.ModuleList(
                Block(config.embed_dim, heads, window, i % 2 * (window // 2), config.hidden)
                for i in range(config.depths[index])
            )
        })  # fmt: skip
        self.conv = residual_conv(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        inner = x
        for block in self.residual_group["blocks"]:  # type: ignore[union-attr]
            inner = block(inner)
        return x + self.conv(inner.movedim(-1, 1)).movedim(1, -1)


class Block(nn.Module):
    """Attention in windows, then an MLP, each after a norm and in a residual."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int):
        super().__init__()
        self.shift, self.window = (shift, shift), (window, window)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        x = x + in_windows(self.attn, self.norm1(x), self.window, self.shift)
        return x + self.mlp(self.norm2(x))


class WindowAttention(nn.Module):
    """Attention inside each window, with a learnt bias for each head and offset."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (B, windows, L, C), (windows, L, L)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)  # (B, n, H, L, E)
        bias = self.relative_position_bias_table[offsets(self.window).to(x.device)].movedim(-1, 0)  # (H, L, L)
        if mask is not None:
            bias = bias + mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(*q.shape[:-1], -1))
        return self.proj(out.transpose(-2, -3).flatten(-2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def in_windows(attention: nn.Module, x: Tensor, window: Sides, shift: Sides) -> Tensor:
    """attention(windows, mask) of x (B, h, w, C), whose sides are multiples of the window's.

    With a shift, the picture is turned around, and windows over its edge see each part alone.
    """
    height, width = x.shape[1:3]
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    mask = region_mask(height, width, window, shift).to(x.device, x.dtype) if any(shift) else None
    out = joined(attention(cut(x, window), mask), height, width, window)
    return out.roll(shift, (1, 2)) if any(shift) else out


def cut(x: Tensor, window: Sides) -> Tensor:
    """(B, h, w, C) -> (B, windows, L, C)."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def joined(windows: Tensor, height: int, width: int, window: Sides) -> Tensor:
    """(B, windows, L, C) -> (B, h, w, C)."""
    x = windows.unflatten(1, (height // window[0], width // window[1])).unflatten(3, window)
    return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def region_mask(height: int, width: int, window: Sides, shift: Sides) -> Tensor:
    """(windows, L, L): 0 between places of one part of a turned picture, else -100."""

    def parts(side: int, window: int, shift: int) -> Tensor:
        place = torch.arange(side)
        return (place >= side - window).int() + (place >= side - shift).int()

    rows, columns = parts(height, window[0], shift[0]), parts(width, window[1], shift[1])
    regions = cut((3 * rows[:, None] + columns)[None, :, :, None], window)[0, :, :, 0]
    return torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)


def offsets(window: int) -> Tensor:
    """(L, L): the row of the bias table for two places in a square window."""
    down, across = places(window)
    rows, columns = (one[:, None] - one + window - 1 for one in (down, across))
    return rows * (2 * window - 1) + columns


def places(side: int) -> tuple[Tensor, Tensor]:
    """The row and the column of each place in a square window, (L,)."""
    place = torch.arange(side)
    return place.repeat_interleave(side), place.repeat(side)


def pad(x: Tensor, multiple: int) -> Tensor:
    """Pixels whose sides are multiples, by reflection at the right and the bottom; small ones by repeated pixels."""
    height, width = x.shape[2:]
    down, across = -height % multiple, -width % multiple
    return F.pad(x, (0, across, 0, down), "reflect" if down < height and across < width else "replicate")


def conv(width_in: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, padding=1)


def residual_conv(config: SwinIRConfig) -> nn.Module:
    dim, narrow = config.embed_dim, config.embed_dim // 4
    if config.resi_connection == "1conv":
        return conv(dim, dim)
    first, second = nn.LeakyReLU(0.2), nn.LeakyReLU(0.2)
    return nn.Sequential(conv(dim, narrow), first, nn.Conv2d(narrow, narrow, 1), second, conv(narrow, dim))


def pixel_shuffles(scale: int, width: int) -> nn.Sequential:
    """A convolution and a pixel shuffle for each doubling, or one of each for a factor of 3."""
    factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [conv(width, factor**2 * width), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


# Files ----------------------------------------------------------------------------------------------------------------


def is_swinir(shapes: Shapes) -> bool:
    return "layers.0.residual_group.blocks.0.attn.qkv.weight" in shapes and (
        "layers.0.residual_group.blocks.0.attn.relative_position_bias_table" in shapes
        and "layers.0.residual_group.blocks.0.conv_block.cab.0.weight" not in shapes
    )


def rules_of(shapes: Shapes) -> Sequence[Rule]:
    blocks = "layers.{}.residual_group.blocks.{}"
    up = [rename(f"conv_up{i}", f"conv_up.{i - 1}") for i in (1, 2, 3)]
    tables = (drop(f"{blocks}.attn_mask"), drop(f"{blocks}.attn.relative_position_index"))  # they follow from the sizes
    return (*up, *tables, rename("conv_first.1", "conv_first"))


def infer(shapes: Shapes) -> SwinIRConfig:
    block = "layers.{}.residual_group.blocks.0"
    dim, channels = shapes["conv_first.weight"][:2]
    groups = last_number(r"layers\.(\d+)\.", shapes) + 1
    table = f"{block}.attn.relative_position_bias_table"
    window = (math.isqrt(shapes[table.format(0)][0]) + 1) // 2
    unshuffle = math.isqrt(channels // 3)
    scale, upsampler, num_feat = _upsampling(shapes)
    if 3 * unshuffle**2 != channels:
        raise ValueError(f"{channels} channels are not the three of a picture")
    return SwinIRConfig(
        embed_dim=dim,
        depths=tuple(last_number(rf"layers\.{i}\.residual_group\.blocks\.(\d+)\.", shapes) + 1 for i in range(groups)),
        num_heads=tuple(shapes[table.format(i)][1] for i in range(groups)),
        window_size=window,
        hidden=shapes[f"{block.format(0)}.mlp.fc1.weight"][0],
        upscale=scale,
        upsampler=upsampler,
        resi_connection="1conv" if "conv_after_body.weight" in shapes else "3conv",
        num_feat=num_feat,
        unshuffle=unshuffle,
        img_range=255.0 if window == 7 else 1.0,  # the models against JPEG artefacts, the only ones with windows of 7
    )


def _upsampling(shapes: Shapes) -> tuple[int, UpsamplerName, int]:
    """The factor, the kind of upsampler, and its width."""
    width = shapes.get("conv_before_upsample.0.weight", (64,))[0]
    if "conv_up.0.weight" in shapes:
        return 2 ** (last_number(r"conv_up\.(\d+)\.", shapes) + 1), "nearest+conv", width
    if "conv_before_upsample.0.weight" in shapes:
        factors = [
            shape[0] // shape[1] for name, shape in shapes.items() if re.fullmatch(r"upsample\.\d+\.weight", name)
        ]
        return math.isqrt(math.prod(factors)), "pixelshuffle", width
    if "upsample.0.weight" in shapes:
        return math.isqrt(shapes["upsample.0.weight"][0] // 3), "pixelshuffledirect", width
    return 1, "", width


def last_number(pattern: str, names: Iterable[str]) -> int:
    """The largest number that the pattern finds; -1 if there is none."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
