"""How far apart two ways to compute the same numbers may lie, whatever adds them up: MKL, OpenBLAS, AVX2, AVX-512."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

GAIN = 16
"""By how much random weights may enlarge a small difference on its way to pixels: the steps 4 times, the decoder 4."""


def agree(got: Tensor, expected: Tensor, units: float) -> None:
    """The largest difference is at most `units` times the dtype's epsilon, relative to the largest expected number."""
    assert got.shape == expected.shape
    scale, apart = (float(numbers.detach().abs().max()) for numbers in (expected, got - expected))
    unit = torch.finfo(expected.dtype).eps * scale
    assert scale > 0
    assert apart <= units * unit, f"{apart / unit:.0f} epsilons of {scale:.3g} apart, which may be {units:.0f}"


def roundings(*modules: nn.Module) -> float:
    """Epsilons by which the results of two implementations of these modules may differ.

    A sum of n products is rounded n times, by half an epsilon at most, up or down. That is a random walk: two orders
    of the terms end about sqrt(n) epsilons apart at most. Each layer goes on from where the one before it ended, so
    the n of all layers add up below the root. Only linear layers and convolutions are counted: norms, activations and
    attention round less than the products beside them, and parallel layers count as if one followed the other.
    """
    sums = (m.weight for module in modules for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return sum(weight.numel() / len(weight) for weight in sums) ** 0.5


def pictures_agree(got: Tensor, expected: Tensor, pipeline: Any, guidance: float = 1.0) -> None:
    """Two drawings of one picture differ by the roundings of the prompt, of the steps and of the decoder, enlarged.

    The lengths of all steps sum to at most 1, so the steps together add what one velocity adds.

    pipeline: of diffusers. guidance: its scale g where the model is asked twice, v = g c - (g - 1) u; otherwise 1.
    """
    assert expected.std() > 0.02  # a picture, not a flat field
    encoders = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
    around = roundings(*(encoder for encoder in encoders if encoder is not None)) + roundings(pipeline.vae)
    agree(got, expected, GAIN * (around + math.hypot(guidance, guidance - 1) * roundings(pipeline.transformer)))
