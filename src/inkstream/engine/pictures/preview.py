"""Previews: a linear map from latents to RGB, fitted once to each model's autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from inkstream.engine.pictures.inputs import to_image
from inkstream.families import Family

SIDE = 128
"""The side of the pictures that the map is fitted on, and the least side of a preview, in pixels."""


def fit_preview(family: Family, device: torch.device) -> Callable[[Tensor], Image.Image]:
    """The function from latents (C, h, w) to a preview picture.

    The map is the least-squares fit of the mean colours of smooth random pictures to their latents.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = torch.rand(8, 3, 5, 5, generator=generator)
    pictures = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    with torch.inference_mode():
        latents = family.encode_image(pictures.to(device)).float().cpu()
    colours = F.adaptive_avg_pool2d(pictures, (latents.shape[-2], latents.shape[-1]))
    solve = cast("Callable[..., tuple[Tensor, ...]]", torch.linalg.lstsq)  # pyright: ignore[reportUnknownMemberType]
    # By SVD: where channels depend on each other, the default (gelsy) gave a wrong map in one of ten runs.
    weight, *_ = solve(_rows(latents), colours.movedim(1, -1).reshape(-1, 3), driver="gelsd")  # (C + 1, 3)

    def preview(latents: Tensor) -> Image.Image:
        h, w = latents.shape[-2:]
        rgb = (_rows(latents[None].float().cpu()) @ weight).reshape(h, w, 3).movedim(-1, 0).clamp(0, 1)
        scale = max(1, -(-SIDE // min(h, w)))
        return to_image(rgb).resize((w * scale, h * scale), Image.Resampling.BICUBIC)

    return preview


def _rows(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B*h*w, C + 1): one row for each latent cell, with a 1 appended for the constant term."""
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=-1)
