"""What an adapter changes: for each layer some `Change`s, whose algebra is LoRA's or a relative's.

Every change is linear in its strength s: W becomes W + s * delta(W). Several changes of one layer are all relative to
the layer's own weight. A change computes in two ways, which are equal: `delta` is the dense change, for merging;
`bind` returns a `Bound`, which adds the change to a layer's output, for drawing without a change of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from inkstream.weights.files import few

Move = Callable[[Tensor], Tensor]
"""Moves a float32 tensor to a layer's device and compute dtype."""


class Bound(Protocol):
    """A change that is ready to run: its tensors are on the layer's device, in the layer's compute dtype."""

    @property
    def bytes(self) -> int:
        """The memory of its tensors."""
        ...

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        """Add strength * delta(W) @ x to out, in place.

        x: (N, I), the layer's input. plain: (N, O), the layer's own output with its bias; it may be the same tensor as
        `out`. out: (N, O), the output that changes.
        """
        ...


class Change(Protocol):
    """What an adapter does to the weight of a layer (O, I), or to some rows of it. Its tensors are float32.

    A weight or a magnitude that is divided by a norm takes no gradient through the norm; all else is differentiable.
    """

    @property
    def algebra(self) -> str:
        """The name of the kind of change, such as LoRA."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape, (O, I)."""
        ...

    @property
    def rank(self) -> int | None:
        """The rank of the low-rank factors; None if the algebra has none."""
        ...

    @property
    def reads(self) -> bool:
        """Whether `delta` and `bind` need the layer's weight."""
        ...

    def delta(self, weight: Tensor | None) -> Tensor:
        """The change of the weight at strength 1. weight: (O, I) float32, or None if not `reads`. (O, I) float32"""
        ...

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        """Prepare the change for a layer. weight: as in `delta`. bias: (O,), or None. to: moves its tensors there."""
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: delta = scale * up @ down (arXiv 2106.09685). down: (r, I), up: (O, r)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0  # alpha / r; with rsLoRA alpha / sqrt(r) (arXiv 2312.03732)
    algebra = "LoRA"
    reads = False

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1]

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.scale * (self.up @ self.down)

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        return BoundLowRank(to(self.down), to(self.up), self.scale)


@dataclass(frozen=True, eq=False)
class BoundLowRank:
    """A low-rank change on a device. Products accumulate in float32; `out` is rounded once."""

    down: Tensor  # (r, I)
    up: Tensor  # (O, r)
    scale: float

    @property
    def bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        out.addmm_(x @ self.down.T, self.up.T, alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class BoundRows:
    """Low-rank changes of several row blocks of a layer, with one product of all `down` factors."""

    down: Tensor  # (sum of ranks, I)
    ups: Sequence[tuple[slice, slice, Tensor, float]]  # rows of the layer, rows of `down`, up (O', r), scale

    @property
    def bytes(self) -> int:
        return self.down.nbytes + sum(up.nbytes for _, _, up, _ in self.ups)

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        h = x @ self.down.T
        for rows, ranks, up, scale in self.ups:
            out[:, rows].addmm_(h[:, ranks], up.T, alpha=strength * scale)


def bind_rows(parts: Sequence[tuple[slice, LowRank]], to: Move) -> BoundRows:
    """Prepare low-rank changes of several row blocks of a layer."""
    ends = list(accumulate((change.rank for _, change in parts), initial=0))
    ups = [
        (rows, slice(start, end), to(change.up), change.scale)
        for (rows, change), start, end in zip(parts, ends, ends[1:])
    ]
    return BoundRows(to(torch.cat([change.down for _, change in parts])), ups)


@dataclass(frozen=True, eq=False)
class Full:
    """A dense change: delta = change. change: (O, I)."""

    change: Tensor
    algebra = "full"
    rank = None
    reads = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.change.shape
        return rows, columns

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.change

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        return BoundFull(to(self.change))


@dataclass(frozen=True, eq=False)
class Replacement:
    """Another weight: W becomes `value` at strength 1. value: (O, I)."""

    value: Tensor
    algebra = "replacement"
    rank = None
    reads = True

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.value.shape
        return rows, columns

    def delta(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return self.value - weight

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        return BoundFull(to(self.delta(weight)))


@dataclass(frozen=True, eq=False)
class BoundFull:
    """A dense change on a device."""

    change: Tensor  # (O, I)

    @property
    def bytes(self) -> int:
        return self.change.nbytes

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        out.addmm_(x, self.change.T, alpha=strength)


@dataclass(frozen=True, eq=False)
class Part:
    """A change of some rows of a layer, such as of the queries in a fused QKV layer."""

    change: Change
    rows: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True, eq=False)
class LayerChange:
    """All that an adapter changes in one layer. bias: (O,) float32, the change of the bias at strength 1."""

    parts: Sequence[Part] = ()
    bias: Tensor | None = None


@dataclass(frozen=True)
class Report:
    """What was found in an adapter's file.

    dialects: the kinds of names. algebras: the kinds of changes. ranks: all different ones. matched: the count of keys
    that change this model. unmatched: keys that have no layer in it. text: keys of text encoders, which are ignored.
    repeated: names of layers that are in the file twice, with equal changes; one is ignored. trigger: the words that
    call up what the adapter was trained on. base: the model that it was trained on.
    """

    dialects: tuple[str, ...] = ()
    algebras: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    trigger: str = ""
    base: str = ""

    def remarks(self) -> list[str]:
        """What a user should be told, one line each: keys that change nothing."""
        total = self.matched + len(self.unmatched) + len(self.text)
        lines = []
        if self.unmatched:
            lines.append(f"{len(self.unmatched)} of {total} keys have no layer in this model: {few(self.unmatched)}")
        if self.text:
            lines.append(f"{len(self.text)} of {total} keys are of text encoders, which adapters do not change")
        if self.repeated:
            lines.append(f"{few(self.repeated)}: these layers are there twice, and one copy is ignored")
        return lines


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter, by the layers of one of our models.

    layers: the path of a layer in the model -> its changes. vectors: the name of another parameter, such as a norm's
    weight -> what is added to it at strength 1. replaced: the name of another parameter -> its value at strength 1.
    These two cannot be applied while drawing, only merged. metadata: of its file.
    """

    layers: Mapping[str, LayerChange]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    report: Report = Report()
