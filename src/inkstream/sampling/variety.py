"""More or less variety from seed to seed: noise turned towards other noise, and noise on the encoded prompt."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from inkstream.types import Conditioning, Variation

SHARE = 0.5
"""Share of the prompt's numbers that are changed. InvokeAI's node has the same."""
STREAM = 0x5EED_0F_7E47
"""Parts the seeds of the prompt's noise from those of the picture's noise."""


def varied_noise(noise: Tensor, variation: Variation) -> Tensor:
    """Noise, turned towards the noise of the variation's seed by its strength. noise: float32 on the CPU, any shape.

    The turn is along the arc between the two (slerp; Shoemake 1985), so that the result is as long as noise is.
    """
    generator = torch.Generator("cpu").manual_seed(variation.seed)
    other = torch.randn(noise.shape, generator=generator)
    lengths = math.sqrt(float(noise.square().sum()) * float(other.square().sum()))
    angle = math.acos(max(-1.0, min(1.0, float((noise * other).sum()) / lengths)))
    share = variation.strength
    if math.sin(angle) < 1e-3:  # the same seed
        return torch.lerp(noise, other, share)
    return (math.sin((1 - share) * angle) * noise + math.sin(share * angle) * other) / math.sin(angle)


def varied_prompt(cond: Conditioning, seed: int, strength: float) -> Conditioning:
    """A conditioning with noise on its prompt, entry 0. The given one, which may be cached, is not changed.

    The noise is uniform from -strength to strength times the standard deviation of the prompt's states, on SHARE of
    them. The negative prompt, pooled vectors and references stay.
    """
    tokens = cond.tokens[: cond.lengths[0]]
    generator = torch.Generator("cpu").manual_seed(seed ^ STREAM)
    noise = torch.rand(tokens.shape, generator=generator) * 2 - 1
    chosen = torch.rand(tokens.shape, generator=generator) < SHARE
    states = tokens.float()
    noise = (noise * chosen * strength).to(tokens.device) * states.std()
    return replace(cond, tokens=torch.cat([(states + noise).to(tokens.dtype), cond.tokens[cond.lengths[0] :]]))
