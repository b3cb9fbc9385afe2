"""Small layers shared by the transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.forward import Forward, Rows
from inkstream.nn.gpu import kernels_for
from inkstream.nn.linear import Chain, linear
from inkstream.nn.quant import E4M3, Rounded, all_multiply_fp8, all_multiply_int8, round_to_int8


def rms_norm(x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    """RMS norm over the last axis, with its variance in float32. x: (..., D).

    weight: (D,), or (R, D) where tokens have different weights; x is then (L, D). `rows`, (L,), is the weight row of
    each token; None: R equal runs, as in `scale_runs`.
    """
    if x.ndim == 2 and (fused := kernels_for(x)):
        return fused.rms_norm(x, weight, eps, rows)
    weight = weight if rows is None else weight[rows]
    if is_plain_cpu(x):
        rows = weight.reshape(-1, x.shape[-1])
        return ScaledNorm.apply(x.reshape(-1, x.shape[-1]), rows, eps).view(x.shape)  # type: ignore[union-attr]
    if weight.ndim == 1 or len(weight) == 1:
        return F.rms_norm(x, x.shape[-1:], weight.flatten(), eps)
    return scale_runs(F.rms_norm(x, x.shape[-1:], None, eps), weight)


def rms_norm_into(
    readers: Sequence[nn.Module], x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None
) -> Tensor | Rounded:
    """`rms_norm` of tokens for the layers `readers`: rounded to 8 bits if all of them multiply 8-bit numbers."""
    if all_multiply_fp8(readers, x) and (fused := kernels_for(x)):
        return Rounded(x.dtype, *fused.rms_norm(x, weight, eps, rows, into=E4M3))
    normed = rms_norm(x, weight, eps, rows)
    return round_to_int8(normed) if all_multiply_int8(readers, x) else normed


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    """x + rms_norm(y, weight, eps, rows). x, y: (L, D)."""
    if fused := kernels_for(y):
        return fused.rms_norm(y, weight, eps, rows, add=x)
    return x + rms_norm(y, weight, eps, rows)


def silu_times(gate: Tensor, up: Tensor, readers: Sequence[nn.Module] = ()) -> Tensor | Rounded:
    """silu(gate) * up, both (L, D). readers: the layers that take the result, as in `rms_norm_into`."""
    if fused := kernels_for(gate):
        if all_multiply_fp8(readers, gate):
            return Rounded(gate.dtype, *fused.swiglu(gate, up, into=E4M3))
        return fused.swiglu(gate, up)
    if all_multiply_int8(readers, gate):
        return round_to_int8(gate, up, join=lambda gate, up: F.silu(gate).mul_(up))
    return F.silu(gate) * up


def is_plain_cpu(x: Tensor) -> bool:
    """Whether x is float32 on the CPU, outside a compiler, where each pass over memory costs time.

    A compiler fuses operations itself, and a GPU has its own fused kernels.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class ScaledNorm(torch.autograd.Function):
    """`rms_norm` and its gradient in fewer passes over memory, which is the bottleneck on a CPU. x: (L, D)."""

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
        along = torch.bmm(product, weight.unsqueeze(-1)).flatten(0, 1)  # each token's gradient along its normed input
        scaled = scale_runs(gradient, weight)
        return scaled.addcmul_(normed, along, value=-1 / normed.shape[-1]).mul_(inverse), product.sum(1), None


def run_of_each(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The run number of each token, for runs of these lengths. (sum(lengths),). No host sync."""
    return torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])


def scale_runs(x: Tensor, scale: Tensor) -> Tensor:
    """Scales R equal runs of x's rows. x: (L, D), scale: (R, D), one row a run; R divides L."""
    return (x.unflatten(0, (len(scale), -1)) * scale.unsqueeze(1)).flatten(0, 1)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor | Rounded, forward: Forward, rows: Rows) -> Tensor:  # (N, D)
        gate, up = linear(self.w1, x, forward, rows), linear(self.w3, x, forward, rows)
        return linear(self.w2, silu_times(gate, up, forward.unadapted(self.w2)), forward, rows)


class TimestepEmbedder(nn.Module):
    """Sinusoidal time embedding, cosines first, through two linear layers. t: (T,) -> (T, dim)."""

    FREQUENCIES = 256

    def __init__(self, dim: int, hidden: int = 1024):
        super().__init__()
        self.mlp = Chain(nn.Linear(self.FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, dim))

    def forward(self, t: Tensor, forward: Forward, rows: Rows) -> Tensor:
        half = self.FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * frequencies
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype), forward, rows)
