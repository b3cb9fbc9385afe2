"""Image to image and inpainting: the first step, a solver that keeps the unmasked part, and pasting of the result."""

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


def keep(solver: Solver, image: Tensor, mask: Tensor, noise: Tensor, ts: Sequence[float] = ()) -> Solver:
    """Wrap a solver so that its result equals the image wherever the mask is 0.

    There the model's velocity is replaced by the velocity from the current point straight to the image. So Euler,
    started at `add_noise(image, noise, t)`, stays on the straight path from that noise to the image. Inpainting
    pipelines put their latents back onto the same path after each step. image, mask: broadcastable to the solver's x.
    mask: 1 repaints, 0 keeps. Closing the wrapper closes the solver.

    ts: for Euler, its times. The velocity then leads to the path's point at the next time. This differs only between 0
    and 1: as in those pipelines, each step mixes the solver's point with the path's.
    """
    try:
        query = next(solver)
        while True:
            v = yield query
            s = next((s for s in ts if s < query.t), 0.0)
            query = solver.send(mask * v + (1 - mask) * (query.x - add_noise(image, noise, s)) / (query.t - s))
    except StopIteration as end:
        return end.value
    finally:
        solver.close()


def latent_mask(mask: Tensor, h: int, w: int, smooth: bool = False) -> Tensor:
    """Resize a mask to the latent grid. mask: (H, W) in [0, 1], white repaints -> (1, h, w) in [0, 1], float32.

    Values from 0.5 up become 1. Then the nearest pixel is taken, as in diffusers' inpainting with FLUX.1 and Z-Image;
    or, if `smooth`, the mean of the four pixels in a cell's middle, as with FLUX.2.
    """
    white = (mask >= 0.5).to(torch.float32)[None, None]
    return F.interpolate(white, size=(h, w), mode="bilinear" if smooth else "nearest")[0]


def paste(original: Tensor, result: Tensor, mask: Tensor, feather: int) -> Tensor:
    """Paste the result over the original where the mask is white. original, result: (3, H, W); mask: (H, W).

    Black pixels, mask < 0.5, are exactly the original's. The seam is inside the white part: the result fades in
    linearly over `feather` pixels from the edge. The distance is the Chebyshev distance; the picture's border is not an
    edge. If the white part is less deep than `feather` everywhere, the result fades in over the depth that it has.
    """
    black = (mask < 0.5).to(original.dtype)[None]  # (1, H, W)
    depth = 1 - black  # distance from a white pixel to the nearest black one, counted up to feather + 1
    spread = black
    for _ in range(feather):
        spread = F.max_pool2d(spread, 3, stride=1, padding=1)
        depth = depth + (1 - spread)
    return torch.lerp(original, result, depth / depth.max().clamp(min=1))
