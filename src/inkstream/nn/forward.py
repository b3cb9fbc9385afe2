"""A forward as a value: the samples that it answers, how their tokens lie, and what is done around the blocks of each.

A model makes a `Forward` of the samples that it is given and hands it on: to `run_blocks`, the one loop over a stack,
and to `linear`, the one door to a product. Nothing of it is reached in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inkstream.nn.around import NOTHING, Around
from inkstream.nn.around.adapters import Product
from inkstream.nn.around.cache import StepCache
from inkstream.nn.stack import Blocks, visits


@dataclass(frozen=True, eq=False)
class Sample:
    """One entry of a forward: a point of a picture's path, under one of its prompts.

    x: (C, h, w) float32; prepared: what no step changes, made by the family for this picture and `around`. Its
    `at(t)` is the same for that time alone, or None where the time was not foreseen: what a recording needs.
    """

    x: Tensor
    t: float
    prepared: Any
    around: Around = NOTHING


class Span(NamedTuple):
    """Rows that lie end to end."""

    owner: int  # their sample, by its place in the forward
    length: int
    target: bool = False  # they are of the picture being drawn


@dataclass(frozen=True)
class Rows:
    """How rows of tokens lie. A model says it in spans, so that nothing waits for a device."""

    spans: tuple[Span, ...] = ()

    @staticmethod
    def alone(count: int) -> Rows:
        """So many rows of the one sample that there is."""
        return Rows((Span(0, count),))

    @cached_property
    def samples(self) -> tuple[int, ...]:
        """Those that have rows, in the order in which they come."""
        return tuple(dict.fromkeys(span.owner for span in self.spans))

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each of them, where each one's lie end to end."""
        return [sum(span.length for span in own) for _, own in groupby(self.spans, lambda span: span.owner)]

    @cached_property
    def targets(self) -> Rows:
        """Those of the pictures being drawn alone."""
        return Rows(tuple(span for span in self.spans if span.target))

    def targets_of(self, x: Tensor) -> Tensor:
        """These rows of x. x: (N, ...)"""
        return self._choose(x, [span.target for span in self.spans])

    def of(self, samples: Container[int]) -> Rows:
        """Those of some samples alone."""
        return Rows(tuple(span for span in self.spans if span.owner in samples))

    def take(self, x: Tensor, samples: Container[int]) -> Tensor:
        """These rows of x. x: (N, ...)"""
        return self._choose(x, [span.owner in samples for span in self.spans])

    def join(self, parts: Mapping[tuple[int, ...], Tensor]) -> Tensor:
        """All rows, of parts that have those of some samples each: the inverse of `take`."""
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
        """Those of a range."""
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
        # One split, not slices: the gradient of each slice would be as large as x.
        pieces = x.split([span.length for span in self.spans])
        chosen = [piece for piece, want in zip(pieces, wanted) if want]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


class Forward:
    """One pass of a model over samples."""

    def __init__(self, arounds: Sequence[Around] = (), times: Sequence[float] = (), attention_by: str = "auto"):
        """What is done around each sample, and its time; attention_by: as `attention.choose_attention` has it."""
        self.arounds = arounds
        self.times = times
        self.attention_by = attention_by
        self.adapted = any(around.adapters for around in arounds)
        self.pictures: dict[StepCache, tuple[int, ...]] = {}  # those with a cache, and the samples of each
        for i, around in enumerate(arounds):
            if around.cache is not None:
                self.pictures[around.cache] = (*self.pictures.get(around.cache, ()), i)

    @staticmethod
    def over(samples: Sequence[Sample], attention_by: str = "auto") -> Forward:
        """Of a step; it begins one of each cache."""
        forward = Forward([sample.around for sample in samples], [sample.t for sample in samples], attention_by)
        for cache, own in forward.pictures.items():
            cache.begin(samples[own[0]].t, len(own))
        return forward

    @staticmethod
    def ahead(around: Around, attention_by: str = "auto") -> Forward:
        """Of what is computed before the first step, for one picture: its adapters matter there, and nothing else."""
        return Forward([Around(adapters=around.adapters)], attention_by=attention_by)

    # Products ---------------------------------------------------------------------------------------------------------

    def adapt(self, layer: nn.Module, x: Any, out: Tensor, rows: Rows) -> Tensor:
        """What a layer gives, as the adapters of each row's sample change it. x: (N, I), out: (N, O) -> (N, O).

        x is in full where a layer is adapted: see `unadapted`.
        """
        if not self.adapted:
            return out
        products = [products_of(layer, around) for around in self.arounds]
        if not any(products) or len(out) == 0:
            return out
        assert len(rows) == len(x), f"{len(x)} rows are given to a layer, and {len(rows)} have an owner"
        runs = [[*run] for _, run in groupby(rows.spans, lambda span: [id(one) for one in products[span.owner]])]
        lengths = [sum(span.length for span in run) for run in runs]
        pieces = [
            reduce(lambda out, product, x=x: product(x, out), products[run[0].owner], out)
            for run, x, out in zip(runs, x.split(lengths), out.split(lengths))
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def unadapted(self, *layers: nn.Module) -> Sequence[nn.Module]:
        """The layers, where what they are given may be rounded for them; none where one of them needs it in full."""
        adapts = self.adapted and any(products_of(layer, around) for layer in layers for around in self.arounds)
        return () if adapts else layers

    # Blocks -----------------------------------------------------------------------------------------------------------

    def add(self, stack: str, index: int, x: Tensor, rows: Rows) -> Tensor:
        """What comes out of a block, with the residuals of each picture added to its rows. x: (N, D) of rows, or of
        their targets."""
        if not any(self.arounds[i].residuals for i in rows.samples):
            return x
        spans = rows.spans if len(x) == len(rows) else rows.targets.spans
        pieces = list(x.split([span.length for span in spans]))
        for i, span in enumerate(spans):
            for residual in self.arounds[span.owner].residuals if span.target else ():
                added = residual(stack, index, pieces[i], self.times[span.owner])
                pieces[i] = pieces[i] if added is None else pieces[i] + added
        return torch.cat(pieces)

    def decide(self, added: Tensor, rows: Rows) -> None:
        """Let each picture with a cache decide by what the first block added to its rows. The device is waited for
        once."""
        own = {cache: rows.take(added, samples) for cache, samples in self.pictures.items()}
        changes = torch.stack([cache.change(picture) for cache, picture in own.items()]).tolist()
        for (cache, picture), change in zip(own.items(), changes):
            cache.decide(change, picture)


PLAIN, ANY = Forward(), Rows()
"""Of products that nothing is done around, wherever their rows lie."""


def products_of(layer: nn.Module, around: Around) -> list[Product]:
    """What the adapters of a sample do to a layer, in their order."""
    return [adapter.products[layer] for adapter in around.adapters if layer in adapter.products]


def run_blocks(
    stack: str,
    blocks: Blocks,
    x: Tensor,
    call: Callable[[int, nn.Module, Tensor, Rows], Tensor],
    forward: Forward,
    rows: Rows,
    narrows: bool = False,
) -> Tensor:
    """Send x through the blocks of a stack in order. x: (N, D), whose rows lie as `rows` says.

    call: (index, block, x, rows) gives a block what else it takes. narrows: of the last block come the rows of targets
    alone.
    """

    def through(x: Tensor, start: int, stop: int | None, rows: Rows) -> Tensor:
        for i, block in visits(blocks, start, stop):
            x = forward.add(stack, i, call(i, block, x, rows), rows)
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
    """As `run_blocks`, where pictures have caches: those that skip sit out the blocks between the first and `until`.

    A block that narrows is never left out: what it adds cannot be told row by row. through: (x, start, stop, rows)
    sends rows through some of the blocks.
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
