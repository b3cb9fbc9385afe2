"""Qwen-Image 2.1's autoencoder, of one frame: a video autoencoder's layers without those that only later frames run.

Pictures have four channels, colours and then opacity, from -1 to 1. Each level adds a shortcut without weights around
its layers, which averages groups of channels on the way down and repeats channels on the way up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families import Part, Shapes
from inkstream.families.qwenimage.specs import QwenImageVAEConfig


class Autoencoder(nn.Module):
    """Pixels (B, 4, H, W) to latents (B, C, h, w), each channel with mean 0 and variance 1, and back."""

    def __init__(self, config: QwenImageVAEConfig):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.quant_conv = nn.Conv2d(2 * c.z_dim, 2 * c.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.z_dim, c.z_dim, 1)
        self.decoder = Decoder(c)

    def encode(self, pixels: Tensor) -> Tensor:
        """The mode of the posterior, normed."""
        return self.normalize(self.encode_moments(pixels)[0])

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latents."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def normalize(self, latents: Tensor) -> Tensor:
        """Norms raw latents, as from `encode_moments`, for the transformer."""
        return (latents - self._row(self.config.latents_mean, latents)) / self._row(self.config.latents_std, latents)

    def decode(self, latents: Tensor) -> Tensor:
        raw = latents * self._row(self.config.latents_std, latents) + self._row(self.config.latents_mean, latents)
        return self.decoder(self.post_quant_conv(raw))

    def _row(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=like.dtype).view(-1, 1, 1)


class Encoder(nn.Module):
    def __init__(self, c: QwenImageVAEConfig):
        super().__init__()
        widths = [c.base_dim * factor for factor in (1, *c.dim_mult)]
        halved = [*c.temperal_downsample, False]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Down(widths[i], widths[i + 1], c.num_res_blocks, 2 if i + 1 < len(c.dim_mult) else 1, 1 + halved[i])
            for i in range(len(c.dim_mult))
        )
        self.mid_block = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c: QwenImageVAEConfig):
        super().__init__()
        base = c.base_dim if c.decoder_base_dim is None else c.decoder_base_dim
        widths = [base * factor for factor in (c.dim_mult[-1], *c.dim_mult[::-1])]
        doubled = [*c.temperal_downsample[::-1], False]
        self.conv_in = nn.Conv2d(c.z_dim, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList(
            Up(widths[i], widths[i + 1], c.num_res_blocks + 1, i + 1 < len(c.dim_mult), 1 + doubled[i])
            for i in range(len(c.dim_mult))
        )
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Down(nn.Module):
    """Residual layers, then half of the rows and columns. frames: how many frames of a video become one."""

    def __init__(self, width: int, out: int, layers: int, factor: int, frames: int):
        super().__init__()
        self.factor, self.frames, self.out = factor, frames, out
        self.resnets = nn.ModuleList(Residual(width if i == 0 else out, out) for i in range(layers))
        self.downsampler = Resample(nn.Conv2d(out, out, 3, stride=2)) if factor > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for layer in self.resnets:
            x = layer(x)
        if self.downsampler is not None:
            x = self.downsampler.resample[1](F.pad(x, (0, 1, 0, 1)))
        cells = F.pixel_unshuffle(kept, self.factor).unflatten(1, (kept.shape[1], -1))  # (B, C, 4, h, w)
        before = torch.zeros_like(cells).repeat(1, 1, self.frames - 1, 1, 1)  # a picture follows frames of zeros
        return x + torch.cat((before, cells), dim=2).flatten(1, 2).unflatten(1, (self.out, -1)).mean(2)


class Up(nn.Module):
    """Residual layers, then twice as many rows and columns. frames: how many frames of a video one becomes."""

    def __init__(self, width: int, out: int, layers: int, grows: bool, frames: int):
        super().__init__()
        self.frames, self.out = frames, out
        self.resnets = nn.ModuleList(Residual(width if i == 0 else out, out) for i in range(layers))
        self.upsampler = Resample(nn.Conv2d(out, out, 3, padding=1)) if grows else None

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for layer in self.resnets:
            x = layer(x)
        if self.upsampler is None:
            return x
        x = self.upsampler.resample[1](F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
        repeats = self.out * 4 * self.frames // kept.shape[1]
        cells = kept.repeat_interleave(repeats, dim=1).unflatten(1, (self.out, self.frames, 4))
        return x + F.pixel_shuffle(cells[:, :, -1].flatten(1, 2), 2)  # a picture is the last frame


class Resample(nn.Module):
    """The convolution of a change of size, under its name in the release."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), layer])


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width)])
        self.resnets = nn.ModuleList(Residual(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Attention(nn.Module):
    """One head over all cells."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = Norm(width, dims=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)  # (B, h * w, C)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).mT.unflatten(2, x.shape[2:]))


class Residual(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1 = Norm(width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = Norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Norm(nn.Module):
    """RMS norm over the channels. dims: the axes of size 1 behind the weight's channels in the release."""

    def __init__(self, width: int, dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.normalize(x.float(), dim=1).to(x.dtype)
        return normed * x.shape[1] ** 0.5 * self.gamma.view(-1, 1, 1)


# As a Part ------------------------------------------------------------------------------------------------------------


def infer_autoencoder(shapes: Shapes) -> QwenImageVAEConfig:
    """Sizes from the shapes of the weights. Shapes do not show the statistics: the published ones are assumed."""
    base, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down_blocks.")})
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    layers = {name.split(".")[4] for name in shapes if name.startswith("encoder.down_blocks.0.resnets.")}
    return QwenImageVAEConfig(
        base_dim=base,
        decoder_base_dim=shapes["decoder.conv_out.weight"][1],
        z_dim=shapes["post_quant_conv.weight"][0],
        dim_mult=tuple(width // base for width in widths),
        num_res_blocks=len(layers),
        temperal_downsample=tuple(
            f"encoder.down_blocks.{i}.downsampler.time_conv.weight" in shapes for i in range(levels - 1)
        ),
        in_channels=in_channels,
        out_channels=shapes["decoder.conv_out.weight"][0],
    )


def frames_layers(config: QwenImageVAEConfig) -> Mapping[str, tuple[int, int]]:
    """The layers that only later frames of a video run: name -> outputs and inputs."""
    levels, base = len(config.dim_mult), config.decoder_base_dim or config.base_dim
    down = {i: config.base_dim * config.dim_mult[i] for i in range(levels - 1) if config.temperal_downsample[i]}
    up = {i: base * config.dim_mult[::-1][i] for i in range(levels - 1) if config.temperal_downsample[::-1][i]}
    return {f"encoder.down_blocks.{i}.downsampler.time_conv": (n, n) for i, n in down.items()} | {
        f"decoder.up_blocks.{i}.upsampler.time_conv": (2 * n, n) for i, n in up.items()
    }


def neutral(config: QwenImageVAEConfig) -> dict[str, Tensor]:
    shapes = frames_layers(config)
    weights = {f"{name}.weight": torch.zeros(*sizes, 1, 1) for name, sizes in shapes.items()}
    return weights | {f"{name}.bias": torch.zeros(out) for name, (out, _) in shapes.items()}


AUTOENCODER = Part(
    phases=("prompt", "picture"),
    build=Autoencoder,
    config=QwenImageVAEConfig,
    layouts={"diffusers": ()},
    infer=infer_autoencoder,
    unread=lambda config: tuple(f"{name}." for name in frames_layers(config)),
    neutral=neutral,
)
