"""Classifier-free guidance in the standard scale: 1 is the prompt alone, above 1 leads away from the negative one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

PICTURE = (-3, -2, -1)
"""The dimensions of one."""


def guide(positive: Tensor, negative: Tensor, scale: float, normalization: float = 0.0) -> Tensor:
    """positive + (scale - 1) (positive - negative), capped in norm if `normalization` is above 0.

    positive, negative: (..., C, h, w) velocities of the two prompts. A sample whose norm exceeds `normalization` times
    its positive one's is scaled down to that; samples are the leading dimensions, each on its own. Z-Image's published
    code writes the same with `guidance_scale` = scale - 1.
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
    """Whether guidance acts at time t, so that the negative prompt must be evaluated.

    Only a scale above 1 guides: 0, which Turbo's model card asks for, and 1 both mean the prompt alone, and nothing
    between them leads towards the negative prompt. It acts for stop <= t <= start, and no more once 1 - t exceeds
    `truncation`.
    """
    return scale > 1 and stop <= t <= start and 1 - t <= truncation
