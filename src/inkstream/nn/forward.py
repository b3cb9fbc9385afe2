"""A forward as a value: its samples, the layout of their tokens, and the additions around the blocks of each sample.

A model makes a `Forward` of its samples and passes it to `run_blocks`, the one loop over a stack, and to `linear`, the
one function for linear layers. No global state is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inkstream.nn.around import NOTHING, Around
from inkstream.nn.around.adapters import Product
from inkstream.nn.around.cache import StepCache
from inkstream.nn.around.residuals import Hints
from inkstream.nn.stack import Blocks, visits


@dataclass(frozen=True, eq=False)
class Sample:
    """One entry of a forward: a point on a picture's path, with one of its prompts.

    x: (C, h, w) float32. prepared: what is constant over the steps, made by the family for this picture and `around`.
    `prepared.at(t)` returns it for time t alone, as a CUDA graph recording needs it, or None if t was not foreseen.
    prompt: which of the picture's prompts this is. to: as in `Query`, for flow maps; None: the velocity at the point.
    """

    x: Tensor
    t: float
    prepared: Any
    around: Around = NOTHING
    prompt: int = 0
    to: float | None = None


class Span(NamedTuple):
    """Consecutive rows of one sample."""

    owner: int  # the sample's index in the forward
    length: int
    target: bool = False  # the rows belong to the picture being drawn


@dataclass(frozen=True)
class Rows:
    """The layout of rows of tokens. Models describe it in spans on the host, so there is no host sync."""

    spans: tuple[Span, ...] = ()

    @staticmethod
    def alone(count: int) -> Rows:
        """The layout of this number of rows of a single sample."""
        return Rows((Span(0, count),))

    @cached_property
    def samples(self) -> tuple[int, ...]:
        """The samples that have rows, in the order in which they come."""
        return tuple(dict.fromkeys(span.owner for span in self.spans))

    @cached_property
    def lengths(self) -> list[int]:
        """The row count of each sample, if each sample's rows are consecutive."""
        return [sum(span.length for span in own) for _, own in groupby(self.spans, lambda span: span.owner)]

    @cached_property
    def targets(self) -> Rows:
        """The rows of the pictures being drawn."""
        return Rows(tuple(span for span in self.spans if span.target))

    def targets_of(self, x: Tensor) -> Tensor:
        """Selects the target rows of x. x: (N, ...)"""
        return self._choose(x, [span.target for span in self.spans])

    def of(self, samples: Container[int]) -> Rows:
        """The layout of the rows of some samples."""
        return Rows(tuple(span for span in self.spans if span.owner in samples))

    def take(self, x: Tensor, samples: Container[int]) -> Tensor:
        """Selects the rows of some samples from x. x: (N, ...)"""
        return self._choose(x, [span.owner in samples for span in self.spans])

    def plus(self, x: Tensor, added: Tensor, samples: Container[int], targets: bool) -> Tensor:
        """x with the rows of some samples increased. x: (N, ...). targets: only their target rows have rows in added"""
        pieces = list(x.split([span.length for span in self.spans]))
        own = [i for i, span in enumerate(self.spans) if span.owner in samples and (span.target or not targets)]
        for i, more in zip(own, added.split([self.spans[i].length for i in own])):
            pieces[i] = pieces[i] + more
        return torch.cat(pieces)

    def join(self, parts: Mapping[tuple[int, ...], Tensor]) -> Tensor:
        """All rows, from parts that each hold the rows of some samples: the inverse of `take`."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        pieces = {}
        for samples, x in parts.items():
            own = [i for i, span in enumerate(self.spans) if span.owner in samples]
            pieces |= dict(zip(own, x.split([self.spans[i].length for i in own])))
        return torch.cat([pieces[i] for i in range(len(self.spans))])

    def __len__(self) -> int:
        return sum(span.length for span in self.spans)

    def __getitem__(self, index: slice) -> Rows:
        """The layout of a range of rows."""
        start, stop, _ = index.indices(len(self))
        spans, at = [], 0
        for span in self.spans:
            low, at = at, at + span.length
            if (length := min(at, stop) - max(low, start)) > 0:
                spans.append(span._replace(length=length))
        return Rows(tuple(spans))

    def _choose(self, x: Tensor, wanted: Sequence[bool]) -> Tensor:
        if all(wanted):
            return x
        # One split instead of slices: the gradient of each slice would be as large as x.
        pieces = x.split([span.length for span in self.spans])
        chosen = [piece for piece, want in zip(pieces, wanted) if want]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


ProductBy = Callable[["Forward", nn.Module, Any, Rows], Tensor]
"""Computes `Forward.product` where there are adapters."""


class Forward:
    """One pass of a model over samples."""

    def __init__(self, arounds: Sequence[Around] = (), times: Sequence[float] = (), attention_by: str = "auto"):
        """arounds, times: of each sample; attention_by: the backend, as in `attention.choose_attention`."""
        self.arounds = arounds
        self.times = times
        self.attention_by = attention_by
        self.adapted = any(around.adapters for around in arounds)
        self.product_by: ProductBy = adapted_product  # a compiler takes a function that it does not trace
        self.hints: list[tuple[Container[int], Hints]] = []  # each residual, and the samples of its picture
        self.pictures: dict[StepCache, tuple[int, ...]] = {}  # each step cache, and the samples of its picture
        for i, around in enumerate(arounds):
            if around.cache is not None:
                self.pictures[around.cache] = (*self.pictures.get(around.cache, ()), i)

    @staticmethod
    def over(samples: Sequence[Sample], attention_by: str = "auto") -> Forward:
        """The forward of a step. It begins the step caches and the residuals of its pictures."""
        forward = Forward([sample.around for sample in samples], [sample.t for sample in samples], attention_by)
        for cache, own in forward.pictures.items():
            cache.begin(samples[own[0]].t, len(own))
        owners: dict[Around, dict[int, Sample]] = {}
        for i, sample in enumerate(samples):
            owners.setdefault(sample.around, {})[i] = sample
        forward.hints = [(own, begin(own)) for around, own in owners.items() for begin in around.residuals]
        return forward

    @staticmethod
    def ahead(around: Around, attention_by: str = "auto") -> Forward:
        """The forward of what one picture computes before its first step, where only its adapters count."""
        return Forward([Around(adapters=around.adapters)], attention_by=attention_by)

    # Linear layers ----------------------------------------------------------------------------------------------------

    def product(self, layer: nn.Module, x: Any, rows: Rows) -> Tensor:
        """A layer's output, changed by the adapters of each row's sample. x: (N, I) -> (N, O).

        x has full precision where a layer is adapted: see `unadapted`.
        """
        return self.product_by(self, layer, x, rows) if self.adapted else layer(x)

    def unadapted(self, *layers: nn.Module) -> Sequence[nn.Module]:
        """Returns the layers if their input may be rounded for them; () if an adapter of one needs full precision.

        If products are computed in another way, that is not looked at for each layer, so that a compiler sees one case.
        """
        if not self.adapted:
            return layers
        if self.product_by is not adapted_product:
            return ()
        return () if any(products_of(layer, around) for layer in layers for around in self.arounds) else layers

    # Blocks -----------------------------------------------------------------------------------------------------------

    def add(self, stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor:
        """Adds the residuals of each picture to its rows of a block's output.

        before: (N, D), the block's input. after: its output, for all rows or only for the target rows.
        """
        if not self.hints:
            return after
        left = rows if len(after) == len(rows) else rows.targets
        for owners, hint in self.hints:
            own = rows.of(owners)
            if not own.spans:
                continue
            mine = left.take(after, owners)
            added = hint(stack, index, rows.take(before, owners), mine, own)
            if added is not None:
                after = left.plus(after, added, owners, targets=len(added) != len(mine))
        return after

    def decide(self, added: Tensor, rows: Rows) -> None:
        """Lets each step cache decide from the first block's residual, with one host sync for all."""
        own = {cache: rows.take(added, samples) for cache, samples in self.pictures.items()}
        changes = torch.stack([cache.change(picture) for cache, picture in own.items()]).tolist()
        for (cache, picture), change in zip(own.items(), changes):
            cache.decide(change, picture)


def adapted_product(forward: Forward, layer: nn.Module, x: Any, rows: Rows) -> Tensor:
    """A layer's output, changed in place by the adapters of each row's sample. x: (N, I) -> (N, O)."""
    out: Tensor = layer(x)
    products = [products_of(layer, around) for around in forward.arounds]
    if not any(products) or len(out) == 0:
        return out
    assert len(rows) == len(x), f"a layer got {len(x)} rows, but {len(rows)} rows have an owner"
    runs = [[*run] for _, run in groupby(rows.spans, lambda span: [id(one) for one in products[span.owner]])]
    start = 0
    for run in runs:
        own = slice(start, start := start + sum(span.length for span in run))
        changes = products[run[0].owner]
        plain = out[own].clone() if len(changes) > 1 else out[own]
        for change in changes:
            change(x[own], plain, out[own])
    return out


def products_of(layer: nn.Module, around: Around) -> list[Product]:
    """The changes that a sample's adapters make to a layer, in their order."""
    return [adapter.products[layer] for adapter in around.adapters if layer in adapter.products]


PLAIN, ANY = Forward(), Rows()
"""A forward and rows for layers without adapters, where the layout of the rows does not matter."""


def run_blocks(
    stack: str,
    blocks: Blocks,
    x: Tensor,
    call: Callable[[int, nn.Module, Tensor, Rows], Tensor],
    forward: Forward,
    rows: Rows,
    narrows: bool = False,
) -> Tensor:
    """Runs x through the blocks of a stack in order. x: (N, D), with the layout `rows`.

    call: (index, block, x, rows) calls a block with its other arguments. narrows: the last block returns only the
    target rows.
    """

    def through(x: Tensor, start: int, stop: int | None, rows: Rows) -> Tensor:
        for i, block in visits(blocks, start, stop):
            x = forward.add(stack, i, x, call(i, block, x, rows), rows)
        return x

    if forward.pictures:
        return run_cached(stack, len(blocks) - narrows, through, x, forward, rows)
    return through(x, 0, None, rows)


def run_cached(
    stack: str,
    until: int,
    through: Callable[[Tensor, int, int | None, Rows], Tensor],
    x: Tensor,
    forward: Forward,
    rows: Rows,
) -> Tensor:
    """`run_blocks` with step caches: samples that skip leave out the blocks between the first and `until`.

    A block that narrows is never skipped, since its input and output rows differ and leave no residual per row.
    through: (x, start, stop, rows) runs rows through some of the blocks.
    """
    start = 0
    if any(cache.skips is None for cache in forward.pictures):
        entered, start = x, 1
        x = through(entered, 0, 1, rows)
        forward.decide(x - entered, rows)
        until = max(until, start)
    waiting = {i for cache, samples in forward.pictures.items() for i in samples if cache.skips}
    going = tuple(i for i in rows.samples if i not in waiting)
    parts: dict[tuple[int, ...], Tensor] = {}
    if going:
        entered, own = rows.take(x, going), rows.of(going)
        parts[going] = ran = through(entered, start, until, own)
        for cache, samples in forward.pictures.items():
            if not cache.skips:
                cache.keep(stack, own.take(ran, samples) - own.take(entered, samples))
    for cache, samples in forward.pictures.items():
        if cache.skips:
            parts[samples] = rows.take(x, samples) + cache.foretell(stack)
    return through(rows.join(parts), until, None, rows)
