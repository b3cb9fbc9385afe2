"""Which tokens of a sample see which in attention, where not all see all: a few groups of tokens that see the same.

Regions of a picture with texts of their own are such a case. No mask of N x N is made. Each group attends to copies of
the keys that it sees, so every attention backend can do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inkstream.types import Encoded


@dataclass(frozen=True, eq=False)
class Group:
    """Tokens that see the same. rows: (n,), of the sample's queries. sees: (m,), of its keys.

    bias: (m,) float32, added to the scores of the keys; None: 0.
    """

    rows: Tensor
    sees: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sight:
    """What each token of a sample sees. Every query is in one group.

    back: (N,), the place of each query among the rows of all groups, one after the other. targets: the sight of the
    target's tokens alone, whose queries are counted from the first of them.
    """

    groups: tuple[Group, ...]
    back: Tensor
    targets: Sight | None = None


def texts_of(texts: Sequence[Tensor], regions: Sequence[Encoded]) -> list[list[Tensor]]:
    """The texts of each entry: the prompt and those of its regions, then the negative prompt alone."""
    return [[texts[0], *(region.tokens for region in regions)], *([text] for text in texts[1:])]


def sight_of(
    regions: Sequence[Encoded],
    texts: Sequence[int],
    first: int,
    targets: range,
    grid: tuple[int, int],
    rows: int,
    keys: int,
    device: torch.device,
) -> Sight | None:
    """The sight of a sample with regions; None without.

    A region's text sees itself and the picture's tokens in its box. Those see the text, and its strength is a factor of
    their attention to it. All tokens that are not of a region's text see each other.
    texts: lengths of the prompt and of each region's text, one after the other from row `first`. targets: the rows of
    the picture being drawn; the first of them are its grid (rows, columns). rows: of all tokens. keys: the same, with
    those of a KV cache behind them.
    """
    if not regions:
        return None
    owner = torch.zeros(keys, dtype=torch.long)  # the region of each text's row, from 1; 0: none
    start = first + texts[0]
    for number, length in enumerate(texts[1:], 1):
        owner[start : start + length] = number
        start += length
    inside = torch.zeros(len(regions), keys, dtype=torch.bool)  # the rows in each box
    for cells, region in zip(inside, regions):
        left, top, right, bottom = region.box
        cells[targets.start :][: grid[0] * grid[1]].view(grid)[top:bottom, left:right] = True
    strengths = torch.tensor([1.0, *(region.strength for region in regions)])
    free = (owner[:rows] == 0).nonzero()[:, 0]
    sets, which = inside.T[free].unique(dim=0, return_inverse=True)  # the sets of boxes that tokens are in
    groups: list[Group] = []
    for number, boxes in enumerate(sets):
        seen = torch.cat((torch.tensor([True]), boxes)) & (strengths > 0)
        sees = seen[owner].nonzero()[:, 0]
        factors = strengths[owner[sees]]
        groups.append(Group(free[which == number], sees, None if bool((factors == 1).all()) else factors.log()))
    for number, cells in enumerate(inside, 1):
        text = owner == number
        groups.append(Group(text.nonzero()[:, 0], (text | cells).nonzero()[:, 0]))
    return replace(_whole(groups, range(rows), device), targets=_whole(groups, targets, device))


def _whole(groups: Sequence[Group], rows: range, device: torch.device) -> Sight:
    """The sight of a range of rows, on a device."""
    own = [one.rows[(one.rows >= rows.start) & (one.rows < rows.stop)] - rows.start for one in groups]
    back = torch.cat(own).argsort().to(device)
    placed = [
        Group(some.to(device), one.sees.to(device), None if one.bias is None else one.bias.to(device))
        for some, one in zip(own, groups)
        if len(some)
    ]
    return Sight(tuple(placed), back)
