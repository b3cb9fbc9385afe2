"""Changes of some rows of a layer, of several layers as one, and of a layer whose rows have another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inkstream.types import InputError
from inkstream.weights.lora.changes import Bound, BoundFull, Change, Full, LowRank, Move, Part
from inkstream.weights.lora.factors import IA3, Dora, GLoRA, LoHa, LoKr, size_of
from inkstream.weights.lora.rotations import OutputRotation


@dataclass(frozen=True, eq=False)
class Reordered:
    """The change of a layer whose row i is row order[i] of the layer that `change` is for. order: (O,)"""

    change: Change
    order: Tensor

    @property
    def algebra(self) -> str:
        return self.change.algebra

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape

    @property
    def rank(self) -> int | None:
        return self.change.rank

    @property
    def reads(self) -> bool:
        return self.change.reads

    def delta(self, weight: Tensor | None) -> Tensor:
        theirs = None if weight is None else weight[self.order.argsort()]
        return self.change.delta(theirs)[self.order]

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        return BoundFull(to(self.delta(weight)))


def reorder(change: Change, order: Tensor) -> Change:
    """The change of a layer whose row i is row order[i] of the layer that `change` is for."""
    match change:
        case LowRank():
            return replace(change, up=change.up[order])
        case Full():
            return Full(change.change[order])
        case LoHa():
            return replace(change, a1=change.a1[order], a2=change.a2[order])
        case GLoRA():
            return replace(change, b1=change.b1[order])
        case IA3():
            return change if change.on_input else replace(change, gain=change.gain[order])
        case LoKr(w1=w1, w2=w2) if (blocks := _blocks(order, size_of(w2)[0])) is not None:
            return replace(change, w1=w1[blocks] if isinstance(w1, Tensor) else (w1[0][blocks], w1[1]))
        case OutputRotation(blocks=blocks, rescale=rescale) if (
            blocks.ndim == 3 and (moved := _blocks(order, blocks.shape[-1])) is not None
        ):
            return replace(change, blocks=blocks[moved], rescale=None if rescale is None else rescale[order])
        case Dora(change=inner, magnitude=magnitude) if not isinstance(again := reorder(inner, order), Reordered):
            return Dora(again, magnitude[order] if change.axis == 1 else magnitude)
        case Reordered(change=inner, order=before):
            both = before[order]
            return inner if torch.equal(both, torch.arange(len(both))) else Reordered(inner, both)
        case _:
            return Reordered(change, order)


def _blocks(order: Tensor, height: int) -> Tensor | None:
    """The order of blocks of this height, if an order of rows keeps each block whole."""
    blocks = order.view(-1, height)
    first = blocks[:, 0]
    whole = torch.equal(blocks, first[:, None] + torch.arange(height)) and not (first % height).any()
    return first // height if whole else None


def cut(change: Change, rows: slice, layer: str) -> Change | None:
    """The change of some rows alone, or None if it changes nothing there.

    A Kronecker product is dense if its blocks do not end at the border. Raises InputError, which names `layer`, where a
    cut needs the weight, as of a rotation whose blocks do not end there.
    """
    start, stop, _ = rows.indices(change.shape[0])
    if (start, stop) == (0, change.shape[0]):
        return change
    match change:
        case LowRank():
            up = change.up[rows]
            # Of a block-diagonal matrix, the ranks of other rows fall away; those that no row has learned yet stay.
            used = up.any(0) | ~change.up.any(0)
            return LowRank(change.down[used], up[:, used], change.scale) if used.any() else None
        case LoHa():
            return replace(change, a1=change.a1[rows], a2=change.a2[rows])
        case GLoRA():
            return replace(change, b1=change.b1[rows])
        case IA3():
            return IA3(change.gain if change.on_input else change.gain[rows], (stop - start, change.shape[1]))
        case LoKr() if start % size_of(change.w2)[0] == stop % size_of(change.w2)[0] == 0:
            own = slice(start // size_of(change.w2)[0], stop // size_of(change.w2)[0])
            whole = change.w1
            return replace(change, w1=whole[own] if isinstance(whole, Tensor) else (whole[0][own], whole[1]))
        case OutputRotation(rescale=rescale) if (
            change.blocks.ndim == 3 and start % change.blocks.shape[-1] == stop % change.blocks.shape[-1] == 0
        ):
            size = change.blocks.shape[-1]
            blocks = change.skew[start // size : stop // size] / 2  # their skew part is Q within the limit
            return OutputRotation(
                blocks, (stop - start, change.size[1]), 0.0, None if rescale is None else rescale[rows]
            )
        case Dora(change=inner, magnitude=magnitude) if change.axis == 1:
            own = cut(inner, rows, layer)
            if own is None:  # the norms of these rows change all the same
                own = LowRank(torch.zeros(1, change.shape[1]), torch.zeros(stop - start, 1))
            return Dora(own, magnitude[rows])
        case _ if not change.reads:
            return Full(change.delta(None)[rows])
        case _:
            raise InputError(
                f"the {change.algebra} of {layer} cannot be cut into parts: take another dialect or merge it in a model"
            )


def join(parts: Sequence[Part], height: int, layer: str) -> Change | None:
    """One change of a layer with this many rows, equal to the sum of changes of its rows; None if there are none.

    LoRAs become one: with one `down` if theirs are equal, else with blocks of `up` and the sum of the ranks. Others
    become dense. Raises InputError, which names `layer`, where that needs the weight.
    """
    ranges = [part.rows.indices(height)[:2] for part in parts]
    if not parts:
        return None
    if len(parts) == 1 and ranges[0] == (0, height):
        return parts[0].change
    changes = [part.change for part in parts]
    if all(isinstance(change, LowRank) for change in changes):
        return _join_low_rank([change for change in changes if isinstance(change, LowRank)], ranges, height)
    if all(isinstance(change, Dora) and change.axis == 1 for change in changes) and _tile(ranges, height):
        doras = [change for change in changes if isinstance(change, Dora)]
        inner = join([Part(dora.change, part.rows) for dora, part in zip(doras, parts)], height, layer)
        assert inner is not None
        order = sorted(range(len(parts)), key=lambda i: ranges[i])
        return Dora(inner, torch.cat([doras[i].magnitude for i in order]))
    if reading := [change.algebra for change in changes if change.reads]:
        raise InputError(
            f"the {reading[0]} of parts of {layer} cannot be joined: take another dialect or merge it in a model"
        )
    dense = torch.zeros(height, changes[0].shape[1])
    for (start, stop), change in zip(ranges, changes):
        dense[start:stop] += change.delta(None)
    return Full(dense)


def _join_low_rank(changes: Sequence[LowRank], ranges: Sequence[tuple[int, int]], height: int) -> LowRank:
    first = changes[0]
    scale = first.scale if all(change.scale == first.scale for change in changes) else 1.0
    ups = [change.up * (change.scale / scale) for change in changes]
    if all(torch.equal(change.down, first.down) for change in changes):
        up = first.up.new_zeros(height, first.rank)
        for (start, stop), own in zip(ranges, ups):
            up[start:stop] += own
        return LowRank(first.down, up, scale)
    up, at = first.up.new_zeros(height, sum(change.rank for change in changes)), 0
    for (start, stop), own in zip(ranges, ups):
        up[start:stop, at : at + own.shape[1]] = own
        at += own.shape[1]
    return LowRank(torch.cat([change.down for change in changes]), up, scale)


def _tile(ranges: Sequence[tuple[int, int]], height: int) -> bool:
    """Whether the ranges cover all rows, each once."""
    ordered = sorted(ranges)
    return [start for start, _ in ordered] == [0, *(stop for _, stop in ordered[:-1])] and ordered[-1][1] == height


def rows_of(parts: Sequence[Part], rows: slice, height: int, layer: str) -> Change | None:
    """One change of some rows of a layer with this height: the parts in them, cut where they reach beyond, joined."""
    low, high, _ = rows.indices(height)
    own: list[Part] = []
    for part in parts:
        start, stop, _ = part.rows.indices(height)
        begin, end = max(start, low), min(stop, high)
        if begin < end and (change := cut(part.change, slice(begin - start, end - start), layer)) is not None:
            own.append(Part(change, slice(begin - low, end - low)))
    return join(own, high - low, layer)
