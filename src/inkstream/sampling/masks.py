"""Starting from a picture and repainting part of it: which step to start at, what a solver keeps, what is pasted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from inkstream.types import Solver


def start_index(steps: int, strength: float) -> int:
    """The step to start at, so that `ts[start_index(...):]` is what is left: strength 1 runs all, 0 none.

    The rule of diffusers' image-to-image pipelines; `steps` is the number the schedule has, `len(ts) - 1`.
    """
    return int(max(steps - min(steps * strength, steps), 0))


def keep(solver: Solver, image: Tensor, mask: Tensor) -> Solver:
    """Any solver, made to end at the image wherever the mask is 0.

    There its answers are replaced by the velocity that leads from its point straight to the image, so nothing is drawn
    and nothing blended: Euler, started at `add_noise(image, noise, t)`, stays on the path from that noise to the image,
    which is where inpainting pipelines put it back after every step. image, mask: broadcastable to the solver's x;
    mask: 1 repaints, 0 keeps. Closing it closes the solver.
    """
    try:
        query = next(solver)
        while True:
            v = yield query
            query = solver.send(mask * v + (1 - mask) * (query.x - image) / query.t)
    except StopIteration as end:
        return end.value
    finally:
        solver.close()


def latent_mask(mask: Tensor, h: int, w: int) -> Tensor:
    """The mask on a latent grid. mask: (H, W) in [0, 1], white repaints -> (1, h, w) of 0 and 1, float32.

    Black and white from 0.5 on, then the nearest pixel, as diffusers' Z-Image inpainting does.
    """
    white = (mask >= 0.5).to(torch.float32)
    return F.interpolate(white[None, None], size=(h, w), mode="nearest")[0]


def paste(original: Tensor, result: Tensor, mask: Tensor, feather: int) -> Tensor:
    """The result where the mask is white, the untouched original elsewhere. original, result: (3, H, W); mask: (H, W).

    The seam lies inside the white part: over `feather` pixels from its edge the result fades in linearly (distance
    counted in king's moves; the picture's border is no edge). Black pixels, mask < 0.5, are the original's exactly.
    Where the white part is nowhere that deep, it fades in over the depth it has.
    """
    black = (mask < 0.5).to(original.dtype)[None]  # (1, H, W)
    depth = 1 - black  # moves from a white pixel to the nearest black one, counted up to feather + 1
    spread = black
    for _ in range(feather):
        spread = F.max_pool2d(spread, 3, stride=1, padding=1)
        depth = depth + (1 - spread)
    return torch.lerp(original, result, depth / depth.max().clamp(min=1))
