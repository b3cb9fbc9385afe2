"""Quantise weights: the approximate inverse of `packed.unpack`.

Weights are packed a few rows at a time, so a large weight needs little extra memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inkstream.quant.packed import CHUNK, FORMATS, Packed
from inkstream.quant.small import NF4

Packer = Callable[[Tensor], Tensor]
"""Blocks (N, numbers) float32 -> (N, bytes) uint8."""

Grouped = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Groups (N, numbers) float32 -> bytes (N, bytes) uint8 and scales (N, 1) float."""


def pack(name: str, weight: Tensor, dynamic: bool = False) -> Packed:
    """Pack a matrix (rows, columns) into a format of `FORMATS`, on the matrix's device.

    dynamic: sets `Packed.dynamic`. Raises ValueError if `fits` returns False.
    """
    if not fits(name, tuple(weight.shape)):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not fit {name}")
    form = FORMATS[name]
    rows, columns = weight.shape
    width = columns // form.numbers * form.bytes
    if weight.is_meta:
        data = torch.empty(rows, width, dtype=torch.uint8, device="meta")
        return Packed(name, data, (rows, columns), _scales_on_meta(name, rows, columns), dynamic=dynamic)
    data, scales = torch.empty(rows, width, dtype=torch.uint8, device=weight.device), []
    step = max(1, CHUNK // columns)
    for part, raw in zip(weight.split(step), data.split(step)):
        numbers = part.float()
        if name in BLOCKS:
            raw.copy_(BLOCKS[name](numbers.reshape(-1, form.numbers)).view(-1, width))
        else:
            groups, scale = GROUPS[name](numbers.reshape(-1, form.group or columns))
            raw.copy_(groups.view(-1, width))
            scales.append(scale.view(len(part), -1))
    return Packed(name, data, (rows, columns), (torch.cat(scales),) if scales else (), dynamic=dynamic)


def fits(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a weight of this shape can be packed in the format.

    It must have two axes, and its rows must be divisible into whole blocks or groups.
    """
    form = FORMATS[name]
    return (name in BLOCKS or name in GROUPS) and len(shape) == 2 and shape[1] % max(form.numbers, form.group or 1) == 0


def _scales_on_meta(name: str, rows: int, columns: int) -> tuple[Tensor, ...]:
    if name in BLOCKS:
        return ()
    dtype = torch.float32 if FORMATS[name].group == 0 else torch.float16
    return (torch.empty(rows, columns // (FORMATS[name].group or columns), dtype=dtype, device="meta"),)


# Formats with one scale for each row or group ------------------------------------------------------------------------


def pack_float(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude becomes the format's largest number."""
    scale = _nonzero(x.abs().amax(1, keepdim=True) / torch.finfo(dtype).max)
    return (x / scale).to(dtype).view(torch.uint8), scale


def pack_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = _nonzero(x.abs().amax(1, keepdim=True) / 127)
    return (x / scale).round_().to(torch.int8).view(torch.uint8), scale


def pack_nf4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each scaled number to the nearest of the 16 values of NF4."""
    scale = _nonzero(x.abs().amax(1, keepdim=True).half().float())
    table = torch.tensor(NF4, device=x.device)
    q = torch.bucketize(x / scale, (table[1:] + table[:-1]) / 2)
    return _pair_up(q), scale.half()


def pack_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to -8 ... 7 times the scale. The number of the largest magnitude becomes -8, so scales may be negative."""
    scale = _nonzero((_extreme(x) / -8).half().float())
    q = (x / scale).round_().clamp_(-8, 7) + 8
    return _pair_up(q), scale.half()


def _pair_up(q: Tensor) -> Tensor:
    """Store two numbers of 0 to 15 in one byte, the first in the high half. (N, n) -> (N, n / 2)"""
    q = q.to(torch.uint8)
    return (q[:, ::2] << 4) | q[:, 1::2]


def _nonzero(scale: Tensor) -> Tensor:
    """Replace scales of zero, which rows of zeros have, by one."""
    return torch.where(scale == 0, 1.0, scale)


def _extreme(x: Tensor) -> Tensor:
    """Return the number of the largest magnitude, with its sign. (..., n) -> (..., 1)"""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


GROUPS: dict[str, Grouped] = {
    "e4m3": lambda x: pack_float(x, torch.float8_e4m3fn),
    "e5m2": lambda x: pack_float(x, torch.float8_e5m2),
    "int8": pack_int8,
    "nf4": pack_nf4,
    "int4": pack_int4,
}

# Blocks of 32, with the same results as ggml's quantisation ----------------------------------------------------------


def pack_q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    size = scaled.abs()
    q = scaled.sign() * (size.floor() + (2 * (size - size.floor())).floor())  # round halves away from zero
    return torch.cat((_half(scale), q.to(torch.int8).view(torch.uint8)), 1)


def pack_signed(x: Tensor, bits: int) -> Tensor:
    """Pack Q4_0 or Q5_0. The number of the largest magnitude becomes the lowest integer."""
    middle = 1 << (bits - 1)
    scale = _extreme(x) / -middle
    q = (x * _inverse(scale) + (middle + 0.5)).trunc_().clamp_(0, 2 * middle - 1).to(torch.uint8)
    return torch.cat((_half(scale), *_fifth_bits(q, bits), _halves(q & 15)), 1)


def pack_affine(x: Tensor, bits: int) -> Tensor:
    """Pack Q4_1 or Q5_1. Each block has a scale and a minimum."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    most = (1 << bits) - 1
    scale = (high - low) / most
    q = ((x - low) * _inverse(scale) + 0.5).trunc_().clamp_(0, most).to(torch.uint8)
    return torch.cat((_half(scale), _half(low), *_fifth_bits(q, bits), _halves(q & 15)), 1)


def _fifth_bits(q: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Collect the fifth bits: (N, 32) -> (N, 4). The first number's bit is the lowest bit of the first byte.

    Returns an empty tuple for 4-bit numbers.
    """
    if bits == 4:
        return ()
    place = torch.arange(8, dtype=torch.uint8, device=q.device)
    return (((q >> 4).unflatten(1, (4, 8)) << place).sum(2, dtype=torch.uint8),)


def _halves(q: Tensor) -> Tensor:
    """Store the first half of the numbers in the low 4 bits, the second half in the high 4. (N, n) -> (N, n / 2)"""
    low, high = q.chunk(2, 1)
    return low | (high << 4)


def _half(x: Tensor) -> Tensor:
    """Return the bytes of a number as float16. (N, 1) -> (N, 2)"""
    return x.half().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


# Blocks of 256, whose sub-blocks' scales are scaled integers ---------------------------------------------------------


def pack_q4_k(x: Tensor) -> Tensor:
    head, q = _affine_blocks(x.view(-1, 8, 32), most=15, most_scale=63)
    return torch.cat((head, _nibbles(q)), 1)


def pack_q5_k(x: Tensor) -> Tensor:
    head, q = _affine_blocks(x.view(-1, 8, 32), most=31, most_scale=63)
    return torch.cat((head, _stack_bits(q >> 4, 1), _nibbles(q & 15)), 1)


def pack_q2_k(x: Tensor) -> Tensor:
    x = x.view(-1, 16, 16)
    scale, minimum = fit_affine(x, 3)
    d, dmin, small, smallest = _shrink(scale, minimum, 15)
    q = _affine_integers(x, d * small, dmin * smallest, 3)
    scales = small.to(torch.uint8) | (smallest.to(torch.uint8) << 4)
    return torch.cat((scales, _pairs_of_bits(q), _half(d), _half(dmin)), 1)


def pack_q3_k(x: Tensor) -> Tensor:
    x = x.view(-1, 16, 16)
    scale, small = _symmetric_scales(fit_symmetric(x, -4, 3), -32, 31)
    q = _integers(x, scale * small, -4, 3) + 4
    s = (small + 32).to(torch.uint8)
    low = (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4)
    high = (s >> 4).unflatten(1, (4, 4)) << torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8, device=s.device)
    mask = _stack_bits((q >> 2).view(-1, 8, 32), 1)
    return torch.cat((mask, _pairs_of_bits(q & 3), low, high.sum(1, dtype=torch.uint8), _half(scale)), 1)


def pack_q6_k(x: Tensor) -> Tensor:
    x = x.view(-1, 16, 16)
    scale, small = _symmetric_scales(fit_symmetric(x, -32, 31), -128, 127)
    q = _integers(x, scale * small, -32, 31) + 32
    low = (q & 15).view(-1, 2, 2, 64)
    low = (low[:, :, 0] | (low[:, :, 1] << 4)).flatten(1)
    small = small.to(torch.int8).view(torch.uint8)
    return torch.cat((low, _pairs_of_bits(q >> 4), small, _half(scale)), 1)


def fit_affine(x: Tensor, most: int, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """Fit non-negative scales and minima (N, S), so that integers 0 ... `most` approximate x (N, S, n).

    The start is the range of the numbers. Each round rounds to integers, then fits scale and minimum to them by least
    squares. The pair with the smallest squared error is returned.
    """
    minimum = (-x.amin(-1)).clamp_(min=0)
    scale = (x.amax(-1) + minimum) / most
    best, best_minimum, least = scale, minimum, torch.full_like(scale, torch.inf)
    for _ in range(rounds):
        q = _affine_integers(x, scale, minimum, most).float()
        error = (q * scale.unsqueeze(-1) - minimum.unsqueeze(-1) - x).square().sum(-1)
        better = error < least
        best, best_minimum = torch.where(better, scale, best), torch.where(better, minimum, best_minimum)
        least = torch.minimum(error, least)
        mean_q, mean_x = q.mean(-1), x.mean(-1)
        spread = (q * q).mean(-1) - mean_q * mean_q
        slope = ((q * x).mean(-1) - mean_q * mean_x) / spread
        offset = slope * mean_q - mean_x
        alone = (q * x).sum(-1) / (q * q).sum(-1)  # the fit with a minimum of 0, for a negative offset
        scale = torch.where(offset < 0, alone, slope).nan_to_num_(0, 0, 0).clamp_(min=0)
        minimum = offset.nan_to_num_(0, 0, 0).clamp_(min=0)
    return best, best_minimum


def fit_symmetric(x: Tensor, low: int, high: int, rounds: int = 4) -> Tensor:
    """Fit scales (N, S) of either sign, so that integers low ... high approximate x (N, S, n).

    The method is that of `fit_affine`.
    """
    scale = _extreme(x).squeeze(-1) / low
    best, least = scale, torch.full_like(scale, torch.inf)
    for _ in range(rounds):
        q = _integers(x, scale, low, high).to(torch.int8).float()
        error = (q * scale.unsqueeze(-1) - x).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        scale = ((q * x).sum(-1) / (q * q).sum(-1)).nan_to_num_(0, 0, 0)
    return best


def _affine_blocks(x: Tensor, most: int, most_scale: int) -> tuple[Tensor, Tensor]:
    """Return the 16 bytes of scales of Q4_K and Q5_K, and the integers. x: (N, 8, 32) -> (N, 16), (N, 8, 32)"""
    d, dmin, small, smallest = _shrink(*fit_affine(x, most), most_scale)
    q = _affine_integers(x, d * small, dmin * smallest, most)
    s, m = small.to(torch.uint8), smallest.to(torch.uint8)
    first = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    second = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
    both = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat((_half(d), _half(dmin), first, second, both), 1), q


def _shrink(scale: Tensor, minimum: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise scales and minima to small integers.

    Returns the scale of the scales and the scale of the minima, each (N, 1), then both integers, each (N, S).
    """
    d, dmin = ((values.amax(1, keepdim=True) / most).half().float() for values in (scale, minimum))
    small, smallest = ((v * _inverse(top)).round_().clamp_(0, most) for v, top in ((scale, d), (minimum, dmin)))
    return d, dmin, small, smallest


def _symmetric_scales(scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Quantise scales. Returns the scale of the scales (N, 1) and the scales as integers (N, S)."""
    d = (_extreme(scale) / low).half().float()
    return d, (scale * _inverse(d)).round_().clamp_(low, high)


def _affine_integers(x: Tensor, scale: Tensor, minimum: Tensor, most: int) -> Tensor:
    scaled = (x + minimum.unsqueeze(-1)) * _inverse(scale).unsqueeze(-1)
    return scaled.round_().clamp_(0, most).to(torch.uint8)


def _integers(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Round to integers, returned as uint8 in two's complement. The format stores these integers plus 4 or plus 32."""
    q = (x * _inverse(scale).unsqueeze(-1)).round_().clamp_(low, high)
    return q.to(torch.int8).view(torch.uint8)


def _nibbles(q: Tensor) -> Tensor:
    """Store pairs of neighbouring sub-blocks in the same bytes, the first one in the low halves.

    (N, 8, 32) -> (N, 128)
    """
    pairs = q.view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _pairs_of_bits(q: Tensor) -> Tensor:
    """Store the four runs of 32 numbers of each half block of 128 in the same 32 bytes. (N, 16, 16) -> (N, 64)"""
    runs = q.reshape(-1, 2, 4, 32)
    return (runs[:, :, 0] | (runs[:, :, 1] << 2) | (runs[:, :, 2] << 4) | (runs[:, :, 3] << 6)).flatten(1)


def _stack_bits(q: Tensor, mask: int) -> Tensor:
    """Store number j of run i in bit i of byte j. (N, 8, 32) -> (N, 32)"""
    place = torch.arange(8, dtype=torch.uint8, device=q.device).unsqueeze(1)
    return ((q & mask) << place).sum(1, dtype=torch.uint8)


BLOCKS: dict[str, Packer] = {
    "q8_0": pack_q8_0,
    "q6_k": pack_q6_k,
    "q5_k": pack_q5_k,
    "q5_1": lambda x: pack_affine(x, 5),
    "q5_0": lambda x: pack_signed(x, 5),
    "q4_k": pack_q4_k,
    "q4_1": lambda x: pack_affine(x, 4),
    "q4_0": lambda x: pack_signed(x, 4),
    "q3_k": pack_q3_k,
    "q2_k": pack_q2_k,
}
