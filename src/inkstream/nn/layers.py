"""Small layers shared by the transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, its variance in float32. weight: (D,), or (R, D) as in `scale_runs`."""
    if weight.ndim == 1 or len(weight) == 1:
        return F.rms_norm(x, x.shape[-1:], weight.flatten(), eps)
    return scale_runs(F.rms_norm(x, x.shape[-1:], None, eps), weight)


def scale_runs(x: Tensor, scale: Tensor) -> Tensor:
    """x: (L, D) times scale: (R, D), a row for each of R equal runs of x's rows: R is 1, L, or in between."""
    return (x.unflatten(0, (len(scale), -1)) * scale.unsqueeze(1)).flatten(0, 1)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TimestepEmbedder(nn.Module):
    """Sinusoids of a time, cosines first, through two linear layers. t: (T,) -> (T, dim)."""

    FREQUENCIES = 256

    def __init__(self, dim: int, hidden: int = 1024):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * frequencies
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(wave.to(self.mlp[0].weight.dtype))
