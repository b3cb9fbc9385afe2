"""What an adapter changes: for each layer some `Change`s, whose algebra is LoRA's or a relative's.

Every change is linear in its strength s: W becomes W + s * delta(W). Several changes of one layer are all relative to
the layer's own weight. A change computes in two ways, which are equal: `delta` is the dense change, for merging;
`bind` returns a `Bound`, which adds the change to a layer's output, for drawing without a change of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


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
    """What an adapter does to the weight of a layer (O, I), or to some rows of it. Its tensors are float32."""

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

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Callable[[Tensor], Tensor]) -> Bound:
        """Prepare the change for a layer. weight: as in `delta`. bias: (O,), or None.

        to: moves a float32 tensor to the layer's device and compute dtype.
        """
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: delta = scale * up @ down (arXiv 2106.09685). down: (r, I), up: (O, r)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0  # alpha / r; with rsLoRA alpha / sqrt(r) (arXiv 2312.03732)
    reads = False

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1]

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.scale * (self.up @ self.down)

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Callable[[Tensor], Tensor]) -> Bound:
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
class Part:
    """A change of some rows of a layer, such as of the queries in a fused QKV layer."""

    change: Change
    rows: slice = slice(None)


@dataclass(frozen=True, eq=False)
class LayerChange:
    """All that an adapter changes in one layer. bias: (O,) float32, the change of the bias at strength 1."""

    parts: Sequence[Part] = ()
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter, by the layers of one of our models.

    layers: the path of a layer in the model -> its changes. vectors: the name of another parameter, such as a norm's
    weight -> what is added to it at strength 1. These cannot be applied while drawing, only merged.
    """

    layers: Mapping[str, LayerChange]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
