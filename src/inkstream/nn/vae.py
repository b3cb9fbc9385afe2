"""The convolutional autoencoders of FLUX and Z-Image: pictures to latents and back, whole or in bands of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.config import Flux2VAEConfig, VAEConfig
from inkstream.nn.gpu import kernels_for
from inkstream.types import InputError

WHOLE = 128 * 128
"""The most latent cells that run without tiles: one picture of 1024 x 1024 pixels."""
TILE = 64
"""The side of a tile in latent cells, for more cells than WHOLE."""

# `area` below is the number of positions to process at once, or None for all: see `in_bands`.


class Autoencoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] to latents (B, C, H / 8, W / 8) of about unit variance, and back.

    H and W must be multiples of `config.downscale`, else InputError. `tile`, a side in latent cells, makes layers run
    over bands of about tile * tile cells. The result is the same up to rounding, without seams, in a third of the
    memory. Tiles are for inference: layers overwrite their inputs. Tiles smaller than 32 save nothing more.
    """

    called = ("encoder", "decoder")  # the parts that run alone, and are moved to the device one at a time

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor, tile: int | None = None) -> Tensor:
        """The mean of the latents, shifted and scaled for the transformer."""
        return self.normalize(self.encode_moments(pixels, tile)[0])

    def encode_moments(self, pixels: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, neither shifted nor scaled. A trainer samples from these."""
        check_sides(pixels, self.config.downscale)
        mean, log_variance = self.encoder(in_layout(pixels), tile_area(tile, self.config.downscale)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Pixels, not clamped. latents: as returned by `encode`."""
        latents = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(in_layout(latents), tile_area(tile, self.config.downscale)).contiguous()

    def normalize(self, latents: Tensor) -> Tensor:
        """Shifts and scales raw latents, as from `encode_moments`, for the transformer."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor


class Flux2Autoencoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] to FLUX.2's latents (B, 4C, H / 16, W / 16) of about unit variance, and back.

    A latent cell packs 2 x 2 cells of the convolutions, channel by channel, then row by row. This module norms the
    latents itself. H and W must be multiples of `config.downscale`, else InputError. `tile` is as in `Autoencoder`.
    """

    called = Autoencoder.called

    def __init__(self, config: Flux2VAEConfig):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(
            replace(config, block_out_channels=config.decoder_block_out_channels or config.block_out_channels)
        )
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()
        self.bn = LatentNorm(config.packed_channels, config.batch_norm_eps)

    def encode(self, pixels: Tensor, tile: int | None = None) -> Tensor:
        """The mean of the latents, packed and normed for the transformer."""
        return self.normalize(self.encode_moments(pixels, tile)[0])

    def encode_moments(self, pixels: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents (B, C, H / 8, W / 8), neither packed nor normed."""
        check_sides(pixels, self.config.downscale)
        moments = self.quant_conv(self.encoder(in_layout(pixels), tile_area(tile, self.config.downscale)))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Pixels, not clamped. latents: as returned by `encode`."""
        latents = self.post_quant_conv(F.pixel_shuffle(self.bn.undo(latents), 2))
        return self.decoder(in_layout(latents), tile_area(tile, self.config.downscale)).contiguous()

    def normalize(self, latents: Tensor) -> Tensor:
        """Packs and norms raw latents, as from `encode_moments`, for the transformer."""
        return self.bn(F.pixel_unshuffle(latents, 2))


class LatentNorm(nn.Module):
    """Norms each channel to mean 0 and variance 1, and back, by statistics from training, never from the batch."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w)
        mean, deviation = self._moments()
        return (x - mean) / deviation

    def undo(self, x: Tensor) -> Tensor:
        mean, deviation = self._moments()
        return x * deviation + mean

    def _moments(self) -> tuple[Tensor, Tensor]:
        return self.running_mean.view(-1, 1, 1), (self.running_var + self.eps).sqrt().view(-1, 1, 1)


def tile_for(batch: int, height: int, width: int, cell: int = 8) -> int | None:
    """The `tile` for that many latents of that height and width: None up to `WHOLE` cells of 8 pixels in all.

    cell: pixels per side of one latent cell, `config.downscale`. None too where gradients are recorded: tiles overwrite
    tensors that a backward pass reads.
    """
    small = batch * height * width * cell**2 <= WHOLE * 8**2
    return None if torch.is_grad_enabled() or small else TILE * 8 // cell


def tile_area(tile: int | None, cell: int) -> int | None:
    """The number of pixels in a tile. tile: its side in cells; cell: pixels per side of a cell."""
    return None if tile is None else (tile * cell) ** 2


def check_sides(pixels: Tensor, multiple: int) -> None:
    """Raises InputError unless both sides of pixels (B, 3, H, W) are multiples of `multiple`."""
    height, width = pixels.shape[-2:]
    if height % multiple or width % multiple:
        near = " by ".join(str(max(side // multiple, 1) * multiple) for side in (width, height))
        raise InputError(f"{width} by {height} pixels are not multiples of {multiple}: crop or resize to {near}")


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig | Flux2VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, downsample=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, area: int | None) -> Tensor:  # (B, 3, H, W) -> (B, 2C, h, w)
        x = in_bands(self.conv_in, x, area)
        for block in self.down_blocks:
            x = block(x, area)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, self.mid_block(x, area), area)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig | Flux2VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, upsample=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, area: int | None) -> Tensor:  # (B, C, h, w) -> (B, 3, H, W)
        x = self.mid_block(in_bands(self.conv_in, x, area), area)
        for block in self.up_blocks:
            x = block(x, area)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x, area)


class DownBlock(nn.Module):
    def __init__(self, width_in: int, width: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width_in if i == 0 else width, width, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(width)] if downsample else [])

    def forward(self, x: Tensor, area: int | None) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x, area)
        return x


class UpBlock(nn.Module):
    def __init__(self, width_in: int, width: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width_in if i == 0 else width, width, groups) for i in range(layers))
        self.upsamplers = nn.ModuleList([Upsample(width)] if upsample else [])

    def forward(self, x: Tensor, area: int | None) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, area)
        return x


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)] if attention else [])

    def forward(self, x: Tensor, area: int | None) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x, area)
        return x


class ResnetBlock(nn.Module):
    """A residual of two convolutions, each after a norm and SiLU. With `area`, the input is overwritten."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor, area: int | None) -> Tensor:
        return norm_silu_conv(  # nested, so that no local name keeps the intermediate alive
            self.norm2, self.conv2, norm_silu_conv(self.norm1, self.conv1, x, area), area, add_to=self.shortcut(x, area)
        )

    def shortcut(self, x: Tensor, area: int | None) -> Tensor:
        """The skip path. With `area`, a narrower result is written into the first channels of x."""
        if self.conv_shortcut is None:
            return x
        width = self.conv_shortcut.out_channels
        out = x[:, :width] if area is not None and width < x.shape[1] else None
        return in_bands(self.conv_shortcut, x, area, halo=0, out=out)


class Downsample(nn.Module):
    """Halves the size. The convolution is padded only on the right and at the bottom."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor, area: int | None) -> Tensor:
        return in_bands(lambda band: self.conv(F.pad(band, (0, 1, 0, 1))), x, area, halo=2, scale=0.5)


class Upsample(nn.Module):
    """Doubles the size: nearest-neighbour upsampling, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, area: int | None) -> Tensor:
        area = None if area is None else area // 4  # area counts positions after upsampling
        return in_bands(lambda band: self.conv(F.interpolate(band, scale_factor=2.0)), x, area, scale=2)


class Attention(nn.Module):
    """Attention with one head over all positions, and a residual connection."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, area: int | None) -> Tensor:  # (B, C, h, w)
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h * w, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        count = k.shape[2] if area is None else max(1, area * k.shape[3] // k.shape[2])  # queries: limits score memory
        out = torch.cat([F.scaled_dot_product_attention(some, k, v) for some in q.split(count, dim=2)], dim=2)
        return x + self.to_out[0](out).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class GroupNorm(nn.GroupNorm):
    """Group norm with full precision in the channels-last layout when gradients are off, also as a scale and a shift.

    In that layout, torch on the CPU computes the variance as a difference of large sums. This loses three digits where
    the mean is twenty standard deviations.
    """

    def __init__(self, groups: int, width: int):
        super().__init__(groups, width, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        if layout(input) is not torch.channels_last or torch.is_grad_enabled():  # torch's trains a third faster
            return super().forward(input)
        return self.scaled(input, silu=False)

    def silu(self, x: Tensor) -> Tensor:
        """silu(norm(x))."""
        if layout(x) is not torch.channels_last or kernels_for(x) is None:
            return F.silu(self(x), inplace=True)
        return self.scaled(x, silu=True)

    def scaled(self, x: Tensor, silu: bool) -> Tensor:
        """norm(x) as scale and shift, then SiLU if asked for. x: channels last."""
        scale, shift = self.scale_and_shift(x, None)
        if fused := kernels_for(x):
            out = fused.scale_shift(positions_of(x), scale.flatten(1), shift.flatten(1), silu)
            return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        out = torch.addcmul(shift, x, scale).to(x.dtype)
        return F.silu(out, inplace=True) if silu else out

    def scale_and_shift(self, x: Tensor, area: int | None) -> tuple[Tensor, Tensor]:
        """norm(x) = shift + x * scale for the whole of x; scale and shift are (B, C, 1, 1), float32.

        The moments of each band and channel are computed in two passes, then merged (Chan, Golub and LeVeque 1979).
        """
        means, variances, share = moments_of(x, area)
        means, variances = (m.unflatten(2, (self.num_groups, -1)) for m in (means, variances))
        share = share.view(-1, 1, 1, 1) / means.shape[3]  # weight of each (band, sample, group, channel) in its group
        mean = (share * means).sum((0, 3), keepdim=True)
        variance = (share * (variances + (means - mean).square())).sum((0, 3), keepdim=True)
        scale = self.weight * (variance + self.eps).rsqrt().expand(means[:1].shape).flatten(2)  # (1, B, C)
        shift = self.bias - mean.expand(means[:1].shape).flatten(2) * scale
        return scale[0, :, :, None, None], shift[0, :, :, None, None]


def moments_of(x: Tensor, area: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over each of K bands, and each band's share: two of (K, B, C), and (K,)."""
    if area is None and layout(x) is torch.channels_last and (fused := kernels_for(x)):
        return fused.moments(positions_of(x))
    bands = x.split(band_rows(x, area), dim=2)
    means, variances = [], []
    for band in bands:
        positions = positions_of(band).float()
        mean = positions.mean(1, keepdim=True)
        means.append(mean.squeeze(1))
        variances.append((positions - mean).square_().mean(1))
    share = torch.tensor([band.shape[2] / x.shape[2] for band in bands], device=x.device)
    return torch.stack(means), torch.stack(variances), share


def positions_of(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def norm_silu_conv(
    norm: GroupNorm, conv: nn.Conv2d, x: Tensor, area: int | None, add_to: Tensor | None = None
) -> Tensor:
    """conv(silu(norm(x))), plus `add_to`. With `area`, the result is written into `add_to`."""
    if area is None:
        x = norm.silu(x)
        return conv(x) if add_to is None else conv(x).add_(add_to)
    scale, shift = norm.scale_and_shift(x, area)

    def layer(band: Tensor) -> Tensor:
        return conv(F.silu(torch.addcmul(shift, band, scale).to(x.dtype), inplace=True))

    return in_bands(layer, x, area, out=add_to, add=add_to is not None)


def in_bands(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    area: int | None,
    halo: int = 1,
    scale: float = 1,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """layer(x), computed over bands of rows of about `area` positions each, into `out` if given.

    The layer gets each band with `halo` extra rows on each side. The layer's own padding spoils their results, so these
    are cut off. At the picture's edge there are no extra rows, and the padding is right. scale: output rows per input
    row.
    """
    if area is None:
        return layer(x)
    height, rows = x.shape[2], band_rows(x, area)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        above, below = max(top - halo, 0), min(bottom + halo, height)
        y = layer(x[:, :, above:below])[:, :, int((top - above) * scale) : int((bottom - above) * scale)]
        if out is None:
            shape = (*y.shape[:2], int(height * scale), y.shape[3])
            out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout(y))
        place = out[:, :, int(top * scale) : int(bottom * scale)]
        place.add_(y) if add else place.copy_(y)
    assert out is not None
    return out


def layout(x: Tensor) -> torch.memory_format:
    """The memory layout to use: channels last on the CPU, and on GPUs where the fused kernels compute group norms.

    On the CPU channels last takes a fifth less time and a quarter less memory. On GPUs torch's group norm would copy it
    back to the contiguous layout.
    """
    last = x.device.type == "cpu" or kernels_for(x) is not None
    return torch.channels_last if last else torch.contiguous_format


def in_layout(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=layout(x))


def band_rows(x: Tensor, area: int | None) -> int:
    """The number of rows of x that hold about `area` positions. It is even, so that halving leaves no half rows."""
    return x.shape[2] if area is None else max(2, area // x.shape[3] // 2 * 2)
