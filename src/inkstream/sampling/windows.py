"""Overlapping windows over latents: a large picture is drawn in pieces, and their velocities are blended.

As in MultiDiffusion (Bar-Tal and others 2023), with weights that fade towards a window's edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

OVERLAP = 0.25
"""Share of a window's side that it has in common with its neighbour, at least."""
Corner = tuple[int, int]
"""The top and left of a window, in latents."""
TURNS = (0.0, 0.5, -0.5, 0.25, -0.25)
"""Where the windows are in successive evaluations, as shares of what neighbours have in common."""


@dataclass(frozen=True)
class Windows:
    """Windows of one size that cover latents of h x w, with the rows and columns of their corners."""

    h: int
    w: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    side: tuple[int, int]  # height and width of a window

    @staticmethod
    def over(h: int, w: int, side: int) -> Windows | None:
        """Windows of at most `side` over latents of h x w; None if one window is enough."""
        if max(h, w) <= side:
            return None
        high, wide = min(h, side), min(w, side)
        rows, columns = (firsts_of(whole, own, math.ceil(own * OVERLAP)) for whole, own in ((h, high), (w, wide)))
        return Windows(h, w, rows, columns, (high, wide))

    def moved(self, turn: int) -> Windows:
        """The windows of evaluation number `turn`: those inside move by up to half of what neighbours share.

        So no border is at one place in all steps, where the parts that windows draw alone would meet. The first and
        the last window of an axis stay.
        """
        share = TURNS[turn % len(TURNS)]
        rows, columns = (
            _moved(firsts, side, share) for firsts, side in ((self.rows, self.side[0]), (self.columns, self.side[1]))
        )
        return replace(self, rows=rows, columns=columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def corners(self) -> list[Corner]:
        """The top and left of each window."""
        return [(top, left) for top in self.rows for left in self.columns]

    def fit(self, x: Tensor) -> bool:
        """Whether a tensor is of the whole latents, (C, h, w), and can be cut."""
        return x.shape[1:] == (self.h, self.w)

    def cut(self, x: Tensor, corner: Corner) -> Tensor:
        """(C, h, w) -> the window at a corner, (C, *side)."""
        (top, left), (high, wide) = corner, self.side
        return x[:, top : top + high, left : left + wide]

    def blend(self, pieces: Sequence[Tensor]) -> Tensor:
        """Each window (C, *side) -> (C, h, w), the weighted mean where they overlap."""
        high, wide = self.side
        whole = torch.zeros(pieces[0].shape[0], self.h, self.w, device=pieces[0].device)
        for (top, left), weights, piece in zip(self.corners, _weights(self, whole.device), pieces):
            whole[:, top : top + high, left : left + wide] += weights * piece
        return whole


@lru_cache(maxsize=16)  # a run asks for the same ones at each step
def _weights(windows: Windows, device: torch.device) -> list[Tensor]:
    """The weights of each window, (*side), on a device."""
    downs, acrosses = (
        [_fade(first, side, corners).to(device) for first in corners]
        for corners, side in zip((windows.rows, windows.columns), windows.side)
    )
    return [down[:, None] * across for down in downs for across in acrosses]


def firsts_of(length: int, side: int, overlap: int) -> tuple[int, ...]:
    """The first positions of windows that cover a length, evenly spaced, with `overlap` or more over the one before."""
    last = length - side
    if last <= 0:
        return (0,)
    count = -(-last // max(1, side - overlap)) + 1
    return tuple(dict.fromkeys(round(last * i / (count - 1)) for i in range(count)))


def _moved(firsts: tuple[int, ...], side: int, share: float) -> tuple[int, ...]:
    if len(firsts) < 3:
        return firsts
    by = round(share * min(before + side - after for before, after in pairwise(firsts)))
    return (firsts[0], *(first + by for first in firsts[1:-1]), firsts[-1])


def _fade(first: int, side: int, corners: Sequence[int]) -> Tensor:
    """The weights of a window along one axis. At each position, the weights of all windows sum to 1."""
    positions = torch.arange(first, first + side) + 0.5
    own = _slope(positions, first, side, corners)
    return own / sum(_slope(positions, other, side, corners) for other in corners)


def _slope(positions: Tensor, first: int, side: int, corners: Sequence[int]) -> Tensor:
    """A trapezoid: 1 in the middle and at the picture's edge, falling to 0 over the overlap with a neighbour."""
    index = corners.index(first)
    weights = torch.ones_like(positions)
    if index > 0:
        overlap = max(1, corners[index - 1] + side - first)
        weights = torch.minimum(weights, (positions - first) / overlap)
    if index + 1 < len(corners):
        overlap = max(1, first + side - corners[index + 1])
        weights = torch.minimum(weights, (first + side - positions) / overlap)
    return weights.clamp(min=0)
