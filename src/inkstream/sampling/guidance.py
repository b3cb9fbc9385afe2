"""Classifier-free guidance with the standard scale: 1 uses only the prompt, above 1 moves away from the negative
prompt."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

PICTURE = (-3, -2, -1)
"""The dimensions of one."""


def guide(positive: Tensor, negative: Tensor, scale: float, normalization: float = 0.0) -> Tensor:
    """Return positive + (scale - 1) (positive - negative), with a limited norm if `normalization` is above 0.

    positive, negative: (..., C, h, w), the velocities of the two prompts. The norm of each sample is limited to
    `normalization` times the norm of its positive velocity; a larger sample is scaled down. The leading dimensions are
    the samples. Z-Image's published code computes the same with `guidance_scale` = scale - 1.
    """
    guided = positive + (scale - 1) * (positive - negative)
    if normalization > 0:
        cap, norm = normalization * _norm(positive), _norm(guided)
        guided = torch.where(norm > cap, guided * (cap / norm), guided)
    return guided


def _norm(v: Tensor) -> Tensor:
    """Of each sample: (..., C, h, w) -> (..., 1, 1, 1)."""
    return cast(Tensor, torch.linalg.vector_norm(v, dim=PICTURE, keepdim=True))  # pyright: ignore[reportUnknownMemberType]


def is_on(t: float, scale: float, truncation: float = 1.0, start: float = 1.0, stop: float = 0.0) -> bool:
    """Return whether guidance is on at time t, so that the negative prompt must be evaluated.

    Guidance is on only for a scale above 1, for stop <= t <= start, and while 1 - t is not above `truncation`. All
    scales from 0 to 1 use only the prompt: Turbo's model card asks for 0, and a scale between 0 and 1 must not move
    towards the negative prompt.
    """
    return scale > 1 and stop <= t <= start and 1 - t <= truncation
