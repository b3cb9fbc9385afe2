"""Dequantise formats without blocks: 8-bit and 4-bit numbers with their scales in separate tensors.

The `unpack_` functions take bytes (N, 1) uint8 and return the one or two numbers of each byte, (N, 1 or 2) float32,
not yet scaled.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E)."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of 4-bit floats: one sign bit, two bits of exponent, one bit of mantissa."""

INT4 = tuple(float(i - 8) for i in range(16))
SIGNED4 = tuple(float(i - 16 * (i > 7)) for i in range(16))
"""Values of 4-bit integers: with 8 added, and in two's complement."""


def unpack_e4m3(b: Tensor) -> Tensor:
    if b.is_cuda:
        return b.view(torch.float8_e4m3fn).float()
    # A lookup table, because the cast is slow or missing on other devices.
    return _e4m3_table(b.device).index_select(0, b.flatten().int()).unsqueeze(1)


def unpack_e5m2(b: Tensor) -> Tensor:
    return (b.to(torch.int16) << 8).view(torch.float16).float()  # e5m2 is the upper byte of a float16


def unpack_int8(b: Tensor) -> Tensor:
    return b.view(torch.int8).float()


def unpack_nf4(b: Tensor) -> Tensor:
    return _look_up(b, NF4, low_first=False)


def unpack_int4(b: Tensor) -> Tensor:
    return _look_up(b, INT4, low_first=False)


def unpack_int4_low(b: Tensor) -> Tensor:
    """Unpack integers in two's complement; the low half of a byte is the first number."""
    return _look_up(b, SIGNED4, low_first=True)


def unpack_fp4(b: Tensor) -> Tensor:
    """Unpack NVFP4 as ComfyUI writes it: the high half of a byte is the first number."""
    return _look_up(b, E2M1, low_first=False)


def unpack_fp4_low(b: Tensor) -> Tensor:
    """Unpack NVFP4 as NVIDIA's Model Optimizer writes it: the low half of a byte is the first number."""
    return _look_up(b, E2M1, low_first=True)


@lru_cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """Return the regular Hadamard matrix (size, size). It is orthonormal and symmetric, so it is its own inverse.

    size: a power of 4.
    """
    with torch.inference_mode(False):
        seed = 1 - 2 * torch.eye(4).flip(0)
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.kron(matrix, seed)
        return (matrix / size**0.5).to(device)


def rotate(x: Tensor, size: int) -> Tensor:
    """Multiply each run of `size` numbers of every row by the Hadamard matrix. x: (..., D) -> (..., D)"""
    return (x.unflatten(-1, (-1, size)) @ hadamard(size, x.device).to(x.dtype)).flatten(-2)


def _look_up(b: Tensor, table: tuple[float, ...], low_first: bool) -> Tensor:
    """Look up the two numbers of each byte. (N, 1) -> (N, 2)"""
    return _pairs(table, low_first, b.device).index_select(0, b.flatten().int())


@lru_cache
def _pairs(table: tuple[float, ...], low_first: bool, device: torch.device) -> Tensor:
    """Return the lookup table of the two numbers of every byte. -> (256, 2)"""
    with torch.inference_mode(False):
        values = torch.tensor(table)
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), 1)
        return (pairs.flip(1) if low_first else pairs).to(device)


@lru_cache
def _e4m3_table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
