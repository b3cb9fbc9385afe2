"""Image to image and inpainting: the first step, and a solver that keeps the unmasked part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from inkstream.flow import add_noise
from inkstream.types import Solver


def start_index(steps: int, strength: float) -> int:
    """Return the index of the first step. The remaining times are `ts[start_index(...):]`.

    strength: 1 runs all steps, 0 runs none. steps: the number of steps of the schedule, `len(ts) - 1`. Source: the
    rule of diffusers' image-to-image pipelines.
    """
    return int(max(steps - min(steps * strength, steps), 0))


def keep(
    solver: Solver,
    image: Tensor,
    mask: Tensor,
    noise: Tensor,
    ts: Sequence[float],
    mixes: bool = False,
    soft: bool = False,
) -> Solver:
    """Wrap a solver so that its result equals the image wherever the mask is 0.

    There the model's velocity is replaced by the velocity from the current point straight to the image. So Euler,
    started at `add_noise(image, noise, t)`, stays on the straight path from that noise to the image. Inpainting
    pipelines put their latents back onto the same path after each step. image, mask: broadcastable to the solver's x.
    mask: 1 repaints, 0 keeps. ts: the solver's times. Closing the wrapper closes the solver.

    mixes: for Euler. The velocity then leads to the path's point at the next time. This differs only between 0 and 1:
    as in those pipelines, each step mixes the solver's point with the path's.

    soft: the mask's values are strengths. A point is kept until the share of the steps that are left is no more than
    its strength, and is then repainted (differential diffusion, Levin and Fried 2023).
    """
    try:
        query = next(solver)
        while True:
            v = yield query
            now = (mask >= left_at(query.t, ts)).to(mask.dtype) if soft else mask
            s = next((s for s in ts if s < query.t), 0.0) if mixes else 0.0
            query = solver.send(now * v + (1 - now) * (query.x - add_noise(image, noise, s)) / (query.t - s))
    except StopIteration as end:
        return end.value
    finally:
        solver.close()


def left_at(t: float, ts: Sequence[float]) -> float:
    """Return the share of the steps that are left at a time: 1 in the first step, 1 / steps in the last one."""
    return sum(s < t for s in ts) / max(len(ts) - 1, 1)


def latent_mask(mask: Tensor, h: int, w: int, smooth: bool = False) -> Tensor:
    """Resize a mask to the latent grid. mask: (H, W) in [0, 1], white repaints -> (1, h, w) in [0, 1], float32.

    Values from 0.5 up become 1. Then the nearest pixel is taken, as in diffusers' inpainting with FLUX.1 and Z-Image;
    or, if `smooth`, the mean of the four pixels in a cell's middle, as with FLUX.2.
    """
    white = (mask >= 0.5).to(torch.float32)[None, None]
    return F.interpolate(white, size=(h, w), mode="bilinear" if smooth else "nearest")[0]


def latent_strengths(mask: Tensor, h: int, w: int) -> Tensor:
    """Resize a soft mask to the latent grid: the mean of each cell. mask: (H, W) in [0, 1] -> (1, h, w)."""
    return F.interpolate(mask.to(torch.float32)[None, None], size=(h, w), mode="area")[0]
