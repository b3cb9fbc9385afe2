"""Rotary embeddings over several axes, in real arithmetic, on interleaved pairs (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from inkstream.nn.gpu import kernels_for
from inkstream.nn.layers import is_plain_cpu, rms_norm


@dataclass(frozen=True)
class Rope:
    """The rotary table: for each token, factors of a head's features and of the swapped pairs. Both (L, 1, E)."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def turns(self) -> Tensor:
        """The table as complex numbers, one a pair: (L, 1, E / 2)."""
        return torch.complex(self.cos[..., ::2].contiguous(), self.sin[..., 1::2].contiguous())

    def __getitem__(self, index: slice) -> Rope:
        """The table of a range of tokens."""
        return Rope(self.cos[index], self.sin[index])

    @staticmethod
    def cat(tables: Sequence[Rope]) -> Rope:
        """The table of sequences packed end to end."""
        if len(tables) == 1:
            return tables[0]
        return Rope(torch.cat([t.cos for t in tables]), torch.cat([t.sin for t in tables]))


def rope(positions: Tensor, axes_dims: Sequence[int], theta: float, device: torch.device) -> Rope:
    """Builds the table on `device`. positions: (L, A) integers on the CPU.

    Axis a rotates the next axes_dims[a] features of each head. Angles are computed in float64 and rounded to float32
    once, as in the reference.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(positions[:, axis].double(), frequencies).float())
    angle = torch.cat(angles, dim=-1)  # (L, E/2)
    cos, sin = angle.cos(), angle.sin()
    return Rope(
        cos.repeat_interleave(2, dim=-1).unsqueeze(1).to(device),
        torch.stack((-sin, sin), dim=-1).flatten(-2).unsqueeze(1).to(device),
    )


def rotate(x: Tensor, table: Rope) -> Tensor:
    """Rotates each pair (2i, 2i+1) of features by its angle, in float32. x: (L, H, E) -> the same."""
    wide = x.float()
    if is_plain_cpu(wide):  # one pass over memory instead of four
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table.turns).flatten(-2).to(x.dtype)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * table.cos, swapped, table.sin).to(x.dtype)


def norm_rope(x: Tensor, weight: Tensor, table: Rope, eps: float) -> Tensor:
    """RMS norm of queries or keys over each head's features, then rotation. x: (L, H, E), weight: (E,) -> like x."""
    if fused := kernels_for(x):
        return fused.norm_rope(x, weight, table.cos, table.sin, eps)
    return rotate(rms_norm(x, weight, eps), table)
