"""Triton kernels that fuse several passes over memory into one. Each rounds where the plain operations round.

Only the plain functions that they replace call them, after asking `gpu.kernels_for`. They record no gradients. Rows are
tokens, and a program works on a whole row, so that its norm or range is known before it is written. With `into`, an
8-bit float type, a row is written in that type beside its scale, as input for the 8-bit products of `quant`. Pictures
are channels last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_THREAD = 16
"""Numbers of a row per thread, until there are MOST_WARPS of 32 threads."""
MOST_WARPS = 16
PIECE = 1024
"""The most positions of a picture whose moments one program computes, TILE at a time."""
TILE = 32
CHANNELS = 128
"""The most channels that a program works on."""
LEAST_RANGE = tl.constexpr(1e-30)
"""The smallest range of a row, as in `quant`, so that no row is divided by zero."""

Rows = Tensor | tuple[Tensor, Tensor]
"""A tensor (N, D); or 8-bit numbers (N, D) and the scale of each row (N, 1)."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rows: Tensor | None = None,
    add: Tensor | None = None,
    into: torch.dtype | None = None,
) -> Rows:
    """add + weight * x / rms(x). x, add: (N, D); weight: (D,) or (R, D).

    rows: (N,), the weight row of each token; None: the tokens are R equal runs.
    """
    return _norm(x, weight.reshape(-1, x.shape[-1]), None, rows, add, eps, into)


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    rows: Tensor | None = None,
    into: torch.dtype | None = None,
) -> Rows:
    """shift + (1 + scale) * layer_norm(x). x: (N, D); shift, scale: (R, D); rows: as in `rms_norm`."""
    return _norm(x, scale, shift, rows, None, eps, into)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool = False) -> Tensor:
    """RMS norm of each head's features, then rotation in pairs. x: (N, H, E), its tokens and heads at any stride.

    Pairs are (2i, 2i + 1), and cos and sin are (N, 1, E), as in `rope.Rope`. With halves, pairs are (i, i + E / 2), and
    cos and sin are (N, 1, E / 2).
    """
    count, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    _launch(
        _norm_rope, (count,), tile[0] * tile[1],
        x, weight, cos, sin, out, x.stride(0), x.stride(1), heads, eps,
        WIDTH=width, HEADS=tile[0], BLOCK=tile[1], HALVES=halves,
    )  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor, into: torch.dtype | None = None) -> Rows:
    """silu(gate) * up. Both (N, D)."""
    out, scales = _room(gate, into)
    count, width = gate.shape
    block = triton.next_power_of_2(width)
    _launch(
        _swiglu, (count,), block,
        gate, up, out, scales, gate.stride(0), up.stride(0), width, most(into),
        BLOCK=block,
    )  # fmt: skip
    return out if scales is None else (out, scales)


def round_rows(x: Tensor, into: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales each row of x (N, D) to the range of an 8-bit float type and rounds it to that type."""
    out, scales = _room(x, into)
    count, width = x.shape
    block = triton.next_power_of_2(width)
    _launch(
        _round, (count,), block,
        x, out, scales, x.stride(0), width, most(into),
        BLOCK=block,
    )  # fmt: skip
    assert scales is not None
    return out, scales


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over K pieces of a picture, and the share of the positions in each piece.

    x: (B, L, C), contiguous -> two of (K, B, C) float32, and (K,) that sum to 1.
    """
    batch, positions, channels = x.shape
    piece = min(PIECE, triton.next_power_of_2(max(positions, TILE)))
    pieces = triton.cdiv(positions, piece)
    means, variances = (torch.empty(pieces, batch, channels, device=x.device) for _ in range(2))
    block = min(CHANNELS, triton.next_power_of_2(channels))
    _launch(
        _moments, (pieces, batch, triton.cdiv(channels, block)), TILE * block,
        x, means, variances, positions, channels,
        PIECE=piece, TILE=TILE, BLOCK=block,
    )  # fmt: skip
    share = torch.full((pieces,), piece / positions, device=x.device)
    share[-1] = (positions - (pieces - 1) * piece) / positions
    return means, variances, share


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    """shift + x * scale, then SiLU if asked for. x: (B, L, C), contiguous; scale, shift: (B, C) float32."""
    batch, positions, channels = x.shape
    out = torch.empty_like(x)
    block = min(CHANNELS, triton.next_power_of_2(channels))
    _launch(
        _scale_shift, (triton.cdiv(positions, TILE), batch, triton.cdiv(channels, block)), TILE * block,
        x, scale, shift, out, positions, channels,
        SILU=silu, TILE=TILE, BLOCK=block,
    )  # fmt: skip
    return out


def try_out(device: torch.device) -> None:
    """Runs a kernel once. Raises what Triton raises where it cannot build or run kernels."""
    swiglu(torch.ones(1, 16, device=device), torch.ones(1, 16, device=device))


def most(into: torch.dtype | None) -> float:
    """The largest number of an 8-bit type. Wider types, which tests use, get the largest number of e4m3."""
    return torch.finfo(into if into is not None and into.itemsize == 1 else torch.float8_e4m3fn).max


def _launch(kernel: Any, grid: tuple[int, ...], size: int, *args: Any, **constants: Any) -> None:
    """Runs a kernel whose programs work on `size` numbers each, on the device of its first argument.

    Fused multiply-add is allowed, as in torch's kernels. Versions of Triton differ in its default, and some warn if it
    is not set.
    """
    warps = max(1, min(MOST_WARPS, size // (32 * PER_THREAD)))
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=True)


def _norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    rows: Tensor | None,
    add: Tensor | None,
    eps: float,
    into: torch.dtype | None,
) -> Rows:
    out, scales = _room(x, into)
    count, width = x.shape
    block = triton.next_power_of_2(width)
    _launch(
        _norm_rows, (count,), block,
        x, weight, shift, rows, add, out, scales,
        x.stride(0), weight.stride(0), 0 if shift is None else shift.stride(0), 0 if add is None else add.stride(0),
        max(1, count // len(weight)), width, eps, most(into),
        BLOCK=block,
    )  # fmt: skip
    return out if scales is None else (out, scales)


def _room(x: Tensor, into: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Allocates the output rows, shaped like x, and the scale of each row if they are rounded."""
    out = torch.empty(x.shape, dtype=into or x.dtype, device=x.device)
    return out, None if into is None else torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


# Kernels ------------------------------------------------------------------------------------------------------------
# A pointer that is None leaves its operation out. `run` tokens share a row of weights. Strides are in rows. Row offsets
# are 64 bits wide, since large batches have more numbers than 32 bits count.


@triton.jit
def _norm_rows(
    x, weight, shift, rows, add, out, scales,
    x_stride, weight_stride, shift_stride, add_stride, run, width, eps, most, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token).to(tl.int64) if rows is not None else token // run
    column = tl.arange(0, BLOCK)
    inside = column < width
    dtype = x.dtype.element_ty
    values = tl.load(x + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + row * weight_stride + column, mask=inside, other=0.0)
    if shift is not None:
        values = tl.where(inside, values - tl.sum(values, axis=0) / width, 0.0)
        factor = (1.0 + factor.to(tl.float32)).to(weight.dtype.element_ty)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    if shift is not None:
        values = values.to(dtype).to(tl.float32) * factor.to(tl.float32)
        values += tl.load(shift + row * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    else:
        values *= factor.to(tl.float32)
    if add is not None:
        values = values.to(dtype).to(tl.float32)
        values += tl.load(add + token * add_stride + column, mask=inside, other=0.0).to(tl.float32)
    _write(values.to(dtype), out, scales, token, column, inside, width, most)


@triton.jit
def _swiglu(gate, up, out, scales, gate_stride, up_stride, width, most, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    dtype = gate.dtype.element_ty
    opened = tl.load(gate + token * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    opened = (opened / (1.0 + tl.exp(-opened))).to(dtype).to(tl.float32)
    values = opened * tl.load(up + token * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    _write(values.to(dtype), out, scales, token, column, inside, width, most)


@triton.jit
def _round(x, out, scales, x_stride, width, most, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
    _write(values, out, scales, token, column, inside, width, most)


@triton.jit
def _write(values, out, scales, token, column, inside, width, most):
    """Writes a row: as it is, or with `scales`, scaled to the range of the 8-bit type of `out` and rounded."""
    if scales is not None:
        values = values.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(values), axis=0), LEAST_RANGE) / most
        tl.store(scales + token, scale)
        values = tl.minimum(tl.maximum(values * (1.0 / scale), -most), most)
    tl.store(out + token * width + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope(
    x, weight, cos, sin, out, x_stride, head_stride, heads, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < WIDTH)
    dtype = x.dtype.element_ty
    if HALVES:
        partner = (column + WIDTH // 2) % WIDTH
        angle = token * (WIDTH // 2) + column % (WIDTH // 2)
        sign = tl.where(column < WIDTH // 2, -1.0, 1.0)
    else:
        partner = column ^ 1
        angle = token * WIDTH + column
        sign = 1.0  # the table holds the sign
    start = x + token * x_stride + head * head_stride
    values = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    partners = tl.load(start + partner, mask=inside, other=0.0).to(tl.float32)  # the same cache lines again
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)[:, None]
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    partners_factor = tl.load(weight + partner, mask=column < WIDTH, other=0.0).to(tl.float32)
    values = (values * inverse * factor).to(dtype).to(tl.float32)
    partners = (partners * inverse * partners_factor).to(dtype).to(tl.float32)
    along = tl.load(cos + angle, mask=column < WIDTH, other=0.0).to(tl.float32)
    across = tl.load(sin + angle, mask=column < WIDTH, other=0.0).to(tl.float32) * sign
    turned = values * along + partners * across
    tl.store(out + (token * heads + head) * WIDTH + column, turned.to(dtype), mask=inside)


@triton.jit
def _moments(
    x, means, variances, positions, channels, PIECE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Computes moments tile by tile, each in two passes, and merges them (Chan, Golub and LeVeque, 1979)."""
    piece, sample = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    seen = 0.0
    for start in range(0, PIECE, TILE):
        position = (piece * PIECE + start + tl.arange(0, TILE))[:, None]
        inside = (position < positions) & (channel < channels)[None, :]
        at = (sample.to(tl.int64) * positions + position) * channels + channel[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(positions - piece * PIECE - start, 0), TILE).to(tl.float32)
        own = tl.sum(values, axis=0) / tl.maximum(count, 1.0)
        off = tl.where(inside, values - own[None, :], 0.0)
        apart = own - mean
        both = tl.maximum(seen + count, 1.0)
        squares += tl.sum(off * off, axis=0) + apart * apart * (seen * count / both)
        mean += apart * (count / both)
        seen += count
    at = (piece * tl.num_programs(1) + sample) * channels + channel
    tl.store(means + at, mean, mask=channel < channels)
    tl.store(variances + at, squares / seen, mask=channel < channels)


@triton.jit
def _scale_shift(
    x, scale, shift, out, positions, channels, SILU: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(1)
    position = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    channel = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (position < positions) & (channel < channels)
    at = (sample.to(tl.int64) * positions + position) * channels + channel
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale + sample * channels + channel, mask=channel < channels, other=0.0)
    values = values * factor + tl.load(shift + sample * channels + channel, mask=channel < channels, other=0.0)
    if SILU:
        values = values.to(x.dtype.element_ty).to(tl.float32)
        values = values / (1.0 + tl.exp(-values))
    tl.store(out + at, values.to(x.dtype.element_ty), mask=inside)
