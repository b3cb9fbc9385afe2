"""What is learnt: the velocity of the straight path, or to give a picture back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from inkstream.families import Family
from inkstream.flow import add_noise
from inkstream.nn.forward import Sample
from inkstream.nn.vae import Autoencoder
from inkstream.train.recipe import Objective
from inkstream.types import Conditioning

Prompts = Sequence[tuple[int, ...]]
TAUGHT_GUIDANCE = 1.0
"""What a model that reads its guidance is told while it learns: these are pictures as they are, not exaggerated."""


@dataclass(frozen=True)
class Batch:
    """Samples of one size. images: (B, C, h, w) latents, or (B, 3, H, W) pixels in [-1, 1] for an autoencoder."""

    images: Tensor
    prompts: Prompts = ()  # tokens of each caption, the template included
    cond: Conditioning | None = None  # in their place, where the text encoder does not learn


def draw_times(count: int, settings: Objective, generator: torch.Generator) -> Tensor:
    """(count,) times in (0, 1), float32: logit-normal ones, even ones, and even ones at the noisy end, in shares."""
    device = generator.device
    normal = torch.randn(count, generator=generator, device=device) * settings.std + settings.mean
    even = torch.rand(count, generator=generator, device=device)
    share = torch.rand(count, generator=generator, device=device)
    t = torch.where(share < settings.uniform, even, normal.sigmoid())
    t = shift_time(t, settings.shift)
    high = settings.high_from + (1 - settings.high_from) * even
    return torch.where(share > 1 - settings.high, high, t).clamp(1e-4, 1.0)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times moved to the noisy end as a schedule moves them: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def flow(family: Family, batch: Batch, t: Tensor, noise: Tensor, settings: Objective) -> Tensor:
    """The error of the velocity of each sample, (B,): mean over a sample's own latents, so that sizes weigh alike.

    t: (B,); noise: like batch.images.
    """
    error = flow_error(family, batch, t, noise)
    if settings.weight == "image":  # |image - estimate|^2 / max(t, floor)^2 = |v - estimate|^2 min(1, t / floor)^2
        error = error * (t / settings.floor).clamp(max=1) ** 2
    return error


def flow_error(family: Family, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
    """The plain squared error of the velocity of each sample, (B,)."""
    points = add_noise(batch.images, noise, t.view(-1, 1, 1, 1))
    cond = family.encode_tokens(batch.prompts) if batch.cond is None else batch.cond
    if family.spec.guides == "read":
        cond = replace(cond, guidance=TAUGHT_GUIDANCE)
    height, width = batch.images.shape[-2:]
    down = family.spec.vae.downscale
    prepared = family.prepare(cond, width * down, height * down, ())
    velocity = torch.stack(family.answer([Sample(*each) for each in zip(points.unbind(), t.tolist(), prepared)]))
    return (velocity - (noise - batch.images)).square().mean((1, 2, 3))


def autoencode(vae: Autoencoder, pixels: Tensor, noise: Tensor, settings: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each picture, (B,); the L1 part of it, (B,); and the reconstruction. pixels: (B, 3, H, W).

    Latents are neither shifted nor scaled here: `measure_latents` finds by how much, once the weights are done.
    """
    mean, log_variance = vae.encode_moments(pixels)
    latents = vae.normalize(mean + noise * (0.5 * log_variance).exp())
    if settings.noise:
        latents = latents + noise * torch.linspace(0, settings.noise, len(noise)).to(noise).view(-1, 1, 1, 1)
    seen = vae.decode(latents)
    difference = seen - pixels
    plain = difference.abs().mean((1, 2, 3))
    across, down = difference.diff(dim=3).abs().mean((1, 2, 3)), difference.diff(dim=2).abs().mean((1, 2, 3))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)) / mean[0].numel()
    return plain + settings.gradient * (across + down) + settings.kl * kl, plain, seen


@torch.no_grad()
def measure_latents(vae: Autoencoder, batches: Sequence[Tensor]) -> tuple[float, float]:
    """(shift, scale) that make latents of mean 0 and variance 1. batches: pixels in [-1, 1]."""
    latents = torch.cat([vae.encode_moments(pixels)[0].double().flatten() for pixels in batches])
    return latents.mean().item(), 1 / max(latents.std().item(), 1e-6)


def held_out_times(count: int = 8) -> list[float]:
    """Fixed times, in the middle of so many equal parts."""
    return [(i + 0.5) / count for i in range(count)]


def mix(*numbers: int) -> int:
    """A seed from several numbers: neighbours give unlike ones (splitmix64's finaliser, one round each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1  # a seed of torch's is below 2**63


def psnr(seen: Tensor, pixels: Tensor) -> float:
    """Of pictures in [-1, 1], in decibels."""
    return -10 * math.log10(max(F.mse_loss(seen.clamp(-1, 1), pixels).item() / 4, 1e-10))
