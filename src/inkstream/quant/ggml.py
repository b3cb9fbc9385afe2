"""Dequantise the block formats of GGUF files. The results equal those of ggml bit for bit.

A block holds 32 or 256 numbers of one row. It has one or two float16 scales. A block of 256 also has small integer
scales for its sub-blocks. The numbers are integers of 2 to 8 bits, often stored as a low part and a high part in
different places. The docstrings list the fields of a block with their sizes in bytes.
Every `unpack_` function takes blocks (N, bytes) uint8 and returns (N, numbers) float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack_q8_0(b: Tensor) -> Tensor:
    """Block: scale 2, integers 32."""
    return b[:, 2:].view(torch.int8).float().mul_(half(b, 0))


def unpack_q4_0(b: Tensor) -> Tensor:
    """Block: scale 2, nibbles 16."""
    return nibbles(b[:, 2:]).float().sub_(8).mul_(half(b, 0))


def unpack_q4_1(b: Tensor) -> Tensor:
    """Block: scale 2, minimum 2, nibbles 16."""
    return nibbles(b[:, 4:]).float().mul_(half(b, 0)).add_(half(b, 2))


def unpack_q5_0(b: Tensor) -> Tensor:
    """Block: scale 2, fifth bits 4, nibbles 16."""
    return (nibbles(b[:, 6:]) | (bits(b[:, 2:6]) << 4)).float().sub_(16).mul_(half(b, 0))


def unpack_q5_1(b: Tensor) -> Tensor:
    """Block: scale 2, minimum 2, fifth bits 4, nibbles 16."""
    return (nibbles(b[:, 8:]) | (bits(b[:, 4:8]) << 4)).float().mul_(half(b, 0)).add_(half(b, 2))


def unpack_q2_k(b: Tensor) -> Tensor:
    """Block of 16 sub-blocks: 4-bit scales and minima 16, pairs of bits 64, scale of scales 2, scale of minima 2."""
    scales = half(b, 80) * (b[:, :16] & 15).float()
    minima = half(b, 82) * (b[:, :16] >> 4).float()
    q = planes(b[:, 16:80].unflatten(1, (2, 32)), (0, 2, 4, 6), 3)  # (N, 2, 4, 32)
    return affine(q.reshape(-1, 16, 16), scales, minima)


def unpack_q3_k(b: Tensor) -> Tensor:
    """Block of 16 sub-blocks: third bits 32, pairs of bits 64, 6-bit scales 12, scale of scales 2."""
    low, high = b[:, 96:104], b[:, 104:108]
    small = torch.cat((low & 15, low >> 4), 1) | (planes(high, (0, 2, 4, 6), 3).flatten(1) << 4)
    scales = half(b, 108) * small.float().sub_(32)
    q = planes(b[:, 32:96].unflatten(1, (2, 32)), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    missing = planes(b[:, :32], range(8), 1).reshape(-1, 16, 16) ^ 1  # a bit that is not set subtracts 4
    return (q.float() - (missing << 2).float()).mul_(scales.unsqueeze(-1)).flatten(1)


def unpack_q4_k(b: Tensor) -> Tensor:
    """Block of 8 sub-blocks: scale of scales 2, scale of minima 2, 6-bit scales and minima 12, nibbles 128."""
    scales, minima = small_scales(b)
    q = planes(b[:, 16:].unflatten(1, (4, 32)), (0, 4), 15)  # (N, 4, 2, 32)
    return affine(q.flatten(1, 2), scales, minima)


def unpack_q5_k(b: Tensor) -> Tensor:
    """Block of 8 sub-blocks: scale of scales 2, scale of minima 2, 6-bit scales and minima 12, fifth bits 32,
    nibbles 128."""
    scales, minima = small_scales(b)
    q = planes(b[:, 48:].unflatten(1, (4, 32)), (0, 4), 15).flatten(1, 2)  # (N, 8, 32)
    return affine(q | (planes(b[:, 16:48], range(8), 1) << 4), scales, minima)


def unpack_q6_k(b: Tensor) -> Tensor:
    """Block of 16 sub-blocks: nibbles 128, pairs of bits 64, scales 16, scale of scales 2."""
    low = planes(b[:, :128].unflatten(1, (2, 64)), (0, 4), 15)  # (N, 2, 2, 64)
    high = planes(b[:, 128:192].unflatten(1, (2, 32)), (0, 2, 4, 6), 3)  # (N, 2, 4, 32)
    q = low.flatten(1) | (high.flatten(1) << 4)
    scales = half(b, 208) * b[:, 192:208].view(torch.int8).float()
    return q.view(-1, 16, 16).float().sub_(32).mul_(scales.unsqueeze(-1)).flatten(1)


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of the formats IQ4_NL and IQ4_XS."""


def unpack_iq4_nl(b: Tensor) -> Tensor:
    """Block: scale 2, nibbles 16, each of which is the number of a value."""
    return values(nibbles(b[:, 2:])).mul_(half(b, 0))


def unpack_iq4_xs(b: Tensor) -> Tensor:
    """Block of 8 sub-blocks: scale of scales 2, high 2 bits of scales 2, low 4 bits of scales 4, nibbles 128."""
    high = planes(b[:, 2:4], (0, 2, 4, 6), 3).transpose(1, 2).flatten(1)  # (N, 8)
    low = planes(b[:, 4:8], (0, 4), 15).transpose(1, 2).flatten(1)
    scales = half(b, 0) * (low | (high << 4)).float().sub_(32)
    q = planes(b[:, 8:].unflatten(1, (8, 16)), (0, 4), 15).flatten(2)  # (N, 8, 32)
    return values(q).mul_(scales.unsqueeze(-1)).flatten(1)


def values(q: Tensor) -> Tensor:
    """Look up the values of IQ4."""
    return torch.tensor(IQ4, dtype=torch.float32, device=q.device)[q.int()]


def half(b: Tensor, at: int) -> Tensor:
    """Read the float16 at byte `at` of each block. -> (N, 1) float32"""
    return b[:, at : at + 2].view(torch.float16).float()


def nibbles(q: Tensor) -> Tensor:
    """Return the low 4 bits of all bytes, then the high 4 bits of all bytes. (N, w) -> (N, 2w)"""
    return torch.cat((q & 15, q >> 4), 1)


def bits(q: Tensor) -> Tensor:
    """Return the bits of each byte, lowest bit first. (N, w) -> (N, 8w)"""
    return torch.stack([(q >> i) & 1 for i in range(8)], -1).flatten(1)


def planes(q: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """Shift the bytes right by each of `shifts` and apply the mask. (..., w) -> (..., shifts, w)"""
    return torch.stack([(q >> shift) & mask for shift in shifts], -2)


def small_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and minima of the 8 sub-blocks of Q4_K and Q5_K, each (N, 8) float32."""
    first, second, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((first & 63, (both & 15) | ((first >> 2) & 48)), 1)
    minima = torch.cat((second & 63, (both >> 4) | ((second >> 2) & 48)), 1)
    return half(b, 0) * scales.float(), half(b, 2) * minima.float()


def affine(q: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Return q * scale - minimum for each sub-block. q: (N, S, n); scales, minima: (N, S) -> (N, S * n)"""
    return q.float().mul_(scales.unsqueeze(-1)).sub_(minima.unsqueeze(-1)).flatten(1)
