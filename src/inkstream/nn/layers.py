"""Small layers shared by the transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, its variance in float32. weight: (D,), or (R, D) as in `scale_runs`."""
    if torch.is_grad_enabled() and is_plain_cpu(x):
        rows = weight.reshape(-1, x.shape[-1])
        return ScaledNorm.apply(x.reshape(-1, x.shape[-1]), rows, eps).view(x.shape)  # type: ignore[union-attr]
    if weight.ndim == 1 or len(weight) == 1:
        return F.rms_norm(x, x.shape[-1:], weight.flatten(), eps)
    return scale_runs(F.rms_norm(x, x.shape[-1:], None, eps), weight)


def is_plain_cpu(x: Tensor) -> bool:
    """Whether operations on x run one by one, in float32 on the CPU, where each pass over memory costs: a compiler
    joins them by itself, a GPU has kernels of its own."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class ScaledNorm(torch.autograd.Function):
    """`rms_norm` with a gradient in half the passes over memory, which is what the CPU waits for. x: (L, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return scale_runs(normed, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, inverse, weight = ctx.saved_tensors
        product = (gradient * normed).unflatten(0, (len(weight), -1))  # (R, L / R, D)
        along = torch.bmm(product, weight.unsqueeze(-1)).flatten(0, 1)  # of each token, along what was normed
        scaled = scale_runs(gradient, weight)
        return scaled.addcmul_(normed, along, value=-1 / normed.shape[-1]).mul_(inverse), product.sum(1), None


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
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))
