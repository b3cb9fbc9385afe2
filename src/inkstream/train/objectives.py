"""Training objectives: flow matching (the velocity of the straight path) and autoencoder reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inkstream.families import Family
from inkstream.flow import add_noise
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.forward import Sample
from inkstream.nn.vae import Autoencoder
from inkstream.train.recipe import Objective
from inkstream.types import Conditioning

Prepared = Sequence[tuple[Any, Around]]
"""What an answer at a point needs besides the point, for each point: prepared conditions, and what is done around."""
Prompts = Sequence[tuple[int, ...]]
Follow = Callable[[Family, Tensor, Conditioning], Around]
"""Returns what a control net does around the blocks of a sample, from what it sees of the sample."""
TAUGHT_GUIDANCE = 1.0
"""Guidance value that a guidance-distilled model gets in training: training pictures have no guidance effect."""


@dataclass(frozen=True)
class Batch:
    """Samples of one size. images: (B, C, h, w) latents, or (B, 3, H, W) pixels in [-1, 1] for an autoencoder."""

    images: Tensor
    prompts: Prompts = ()  # tokens of each caption, the template included
    cond: Conditioning | None = None  # cached states, used instead of prompts if the text encoder is frozen
    weights: Tensor | None = None  # (B,) of each sample's loss
    masks: Tensor | None = None  # (B, h, w) of the latents: how much the error counts there
    prior: Tensor | None = None  # (B,) bool: the samples that keep what the model knows
    seen: Sequence[tuple[Tensor, ...]] = ()  # what a control net sees of each sample, one tensor
    references: Sequence[tuple[Tensor, ...]] = ()  # latents (C, h, w) of each sample's reference pictures


def draw_times(count: int, settings: Objective, generator: torch.Generator) -> Tensor:
    """Draw (count,) float32 times in (0, 1] from a mixture.

    The mixture has logit-normal times, a share `uniform` of uniform times, and a share `high` of uniform times at the
    noisy end.
    """
    device = generator.device
    normal = torch.randn(count, generator=generator, device=device) * settings.std + settings.mean
    even = torch.rand(count, generator=generator, device=device)
    share = torch.rand(count, generator=generator, device=device)
    t = torch.where(share < settings.uniform, even, normal.sigmoid())
    t = shift_time(t, settings.shift)
    high = settings.high_from + (1 - settings.high_from) * even
    return torch.where(share > 1 - settings.high, high, t).clamp(1e-4, 1.0)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Shift times to the noisy end, with the formula of the schedules: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def flow(
    family: Family,
    batch: Batch,
    t: Tensor,
    noise: Tensor,
    settings: Objective,
    around: Around = NOTHING,
    before: Around | None = None,
    follow: Follow | None = None,
) -> Tensor:
    """Return the velocity loss of each sample, (B,): the mean over a sample's latents, so all sizes have equal weight.

    t: (B,); noise: same shape as batch.images. around: what is done around the blocks, such as adapters. before: the
    same without the adapter that learns. If it is given, the target of the samples of batch.prior is the velocity
    that the model answers with it (output preservation); else it is that of their pictures. follow: of a control net.
    """
    error = flow_error(family, batch, t, noise, around, before, follow)
    if settings.weight == "image":  # |image - estimate|^2 / max(t, floor)^2 = |v - estimate|^2 min(1, t / floor)^2
        error = error * (t / settings.floor).clamp(max=1) ** 2
    return error if batch.weights is None else error * batch.weights


def flow_error(
    family: Family,
    batch: Batch,
    t: Tensor,
    noise: Tensor,
    around: Around = NOTHING,
    before: Around | None = None,
    follow: Follow | None = None,
) -> Tensor:
    """Return the mean squared error of each sample's velocity, (B,), without a weight over time.

    With a mask, it is the mean weighted by the mask, so that its size does not depend on how much is masked. before: as
    in `flow`.
    """
    points = add_noise(batch.images, noise, t.view(-1, 1, 1, 1))
    cond = family.encode_tokens(batch.prompts) if batch.cond is None else batch.cond
    if family.spec.guides == "read":
        cond = replace(cond, guidance=TAUGHT_GUIDANCE)
    target = noise - batch.images
    if before is not None and batch.prior is not None and batch.prior.any():
        rows = batch.prior.nonzero()[:, 0]
        with torch.no_grad():
            known = Conditioning.pack([cond[i] for i in rows.tolist()])
            target[rows] = velocity_of(family, points[rows], t[rows], [known], [before])
    entries = [cond]
    if batch.references:
        entries = [replace(cond[i], references=references) for i, references in enumerate(batch.references)]
    elif follow is not None:
        entries = [cond[i] for i in range(len(points))]
    arounds = [around] * len(entries)
    if follow is not None:
        arounds = [follow(family, seen, entry) for (seen,), entry in zip(batch.seen, entries, strict=True)]
    squares = (velocity_of(family, points, t, entries, arounds) - target).square()
    if batch.masks is None:
        return squares.mean((1, 2, 3))
    return (squares.mean(1) * batch.masks).sum((1, 2)) / batch.masks.sum((1, 2))


def velocity_of(
    family: Family, points: Tensor, t: Tensor, entries: Sequence[Conditioning], arounds: Sequence[Around]
) -> Tensor:
    """Return the velocity that a model answers at each point, (B, C, h, w).

    entries: what the points are conditioned on, in order; one entry may have the prompts of several. arounds: of each
    entry.
    """
    return answer_at(family, points, t, prepare_for(family, points.shape[-2:], entries, arounds))


def prepare_for(
    family: Family, shape: Sequence[int], entries: Sequence[Conditioning], arounds: Sequence[Around]
) -> Prepared:
    """Return what `answer_at` needs for each point, besides the point. shape: (h, w) of the latents."""
    height, width = (side * family.spec.vae.downscale for side in shape)
    return [
        (one, around)
        for cond, around in zip(entries, arounds, strict=True)
        for one in family.prepare(cond, width, height, (), around)
    ]


def answer_at(family: Family, points: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
    """Return the velocity that a model answers at each point, (B, C, h, w). t: (B,)."""
    samples = [Sample(x, at, *own) for x, at, own in zip(points.unbind(), t.tolist(), prepared, strict=True)]
    return torch.stack(family.answer(samples))


@dataclass(frozen=True)
class Voice:
    """A model, or an adapter of it, that answers velocities."""

    family: Family
    around: Around = NOTHING

    def prepare(self, shape: Sequence[int], entries: Sequence[Conditioning]) -> Prepared:
        """Return what `answer` needs besides points. shape: (..., h, w) of the latents."""
        return prepare_for(self.family, shape[-2:], entries, [self.around] * len(entries))

    def answer(self, points: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        return answer_at(self.family, points, t, prepared)


def autoencode(vae: Autoencoder, pixels: Tensor, noise: Tensor, settings: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Return each picture's loss, (B,), its L1 part, (B,), and the reconstruction. pixels: (B, 3, H, W).

    Latents are neither shifted nor scaled here: `measure_latents` measures shift and scale after training.
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
    """Return (shift, scale) that give the latents mean 0 and variance 1. batches: pixels in [-1, 1]."""
    latents = torch.cat([vae.encode_moments(pixels)[0].double().flatten() for pixels in batches])
    return latents.mean().item(), 1 / max(latents.std().item(), 1e-6)


def held_out_times(count: int = 8) -> list[float]:
    """Return `count` fixed times: the midpoints of `count` equal intervals of [0, 1]."""
    return [(i + 0.5) / count for i in range(count)]


def mix(*numbers: int) -> int:
    """Hash numbers into one seed with the finaliser of splitmix64: similar numbers give unrelated seeds."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1  # torch's seeds are below 2**63


def psnr(seen: Tensor, pixels: Tensor) -> float:
    """Return the PSNR in decibels of pictures in [-1, 1]."""
    return -10 * math.log10(max(F.mse_loss(seen.clamp(-1, 1), pixels).item() / 4, 1e-10))
