"""Unpack the weights of SVDQuant (arXiv 2411.05007) and of AWQ as nunchaku's GPU kernels lay them out.

A matrix of N outputs and K inputs is stored in tiles of 128 x 64. The order of the numbers in a tile is the one in
which the threads of a warp read them. The layouts are those that nunchaku's and DeepCompressor's packers write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inkstream.quant.small import E2M1

TILE, DEPTH = 128, 64
"""Outputs and inputs of a tile."""
GROUP, SMALL_GROUP = 64, 16
"""Numbers that share a scale: of INT4 and AWQ, and of NVFP4."""
PACK = 16
"""Rows and columns of a tile of a low-rank matrix."""
SHIFT = 0.171875
"""What the kernels add to the output of a GELU before they round it to unsigned integers, in INT4 models."""


def unpack_codes(packed: Tensor) -> Tensor:
    """4-bit codes: (N, K / 2) int8 -> (N, K), 0 to 15."""
    rows, width = packed.shape
    stored = packed.reshape(-1).view(torch.uint8).view(rows // TILE, 2 * width // DEPTH, 8, 8, 4, 2, 2, 4)
    codes = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)  # (tiles, depths, pack, lane, lane, half, half, 8)
    return codes.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, 2 * width)


def unpack_vector(packed: Tensor) -> Tensor:
    """A number for each output or input: (N,) -> (N,)."""
    return unpack_scales(packed.reshape(1, -1)).flatten()


def unpack_scales(packed: Tensor) -> Tensor:
    """16-bit scales: (groups, N) -> (N, groups)."""
    groups, rows = packed.shape
    stored = packed.reshape(rows // TILE, groups, 8, 4, 2, 2)
    return stored.permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def unpack_small_scales(packed: Tensor) -> Tensor:
    """NVFP4's 8-bit scales: (groups, N) e4m3 -> (N, groups) float32."""
    groups, rows = packed.shape
    stored = packed.reshape(-1).view(torch.uint8).view(rows // TILE, groups // 4, 8, 4, 4, 4)
    return stored.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups).view(torch.float8_e4m3fn).float()


def unpack_down(packed: Tensor) -> Tensor:
    """The low-rank matrix that reads the input: (K, rank) -> (rank, K)."""
    columns, rank = packed.shape
    return _low_rank(packed).permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, columns)


def unpack_up(packed: Tensor) -> Tensor:
    """The low-rank matrix that gives the output: (N, rank) -> (N, rank)."""
    return _low_rank(packed).permute(0, 4, 2, 1, 5, 3, 6).reshape(packed.shape)


def _low_rank(packed: Tensor) -> Tensor:
    long, rank = packed.shape
    return packed.reshape(long // PACK, rank // PACK, 8, 4, 2, 2, 2)


def unpack_residual(codes: Tensor, scales: Tensor, floats: bool) -> Tensor:
    """The quantised matrix (N, K) float32 from its codes and the scales of groups (N, groups).

    floats: the codes are 4-bit floats (NVFP4); otherwise they are integers in two's complement.
    """
    table = E2M1 if floats else (*range(8), *range(-8, 0))
    numbers = torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.int()]
    return numbers.unflatten(1, (scales.shape[1], -1)).mul_(scales.float().unsqueeze(-1)).flatten(1)


def unpack_awq(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """An AWQ matrix (N, K) float32. packed: (N / 4, K / 2) int32; scales, zeros: (groups or more, N); zeros are scaled.

    16-bit words hold the numbers j, j + 8, j + 16 and j + 24 of a run of 32; four rows share each stretch of memory.
    """
    rows, columns = 4 * packed.shape[0], 2 * packed.shape[1]
    words = packed.reshape(-1).view(torch.int16).view(rows // 4, columns // GROUP, 4, 16).transpose(1, 2)
    words = words.reshape(rows, columns // 32, 8)
    numbers = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], 2).reshape(rows, -1, GROUP).float()
    own = [x[: columns // GROUP].t().float().unsqueeze(-1) for x in (scales, zeros)]  # (N, groups, 1)
    return numbers.mul_(own[0]).add_(own[1]).flatten(1)
