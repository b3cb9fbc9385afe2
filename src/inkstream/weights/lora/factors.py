"""LoRA's relatives that add a product of small factors to a weight, or rescale its rows or columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inkstream.weights.lora.changes import Bound, BoundFull, BoundLowRank, Change, Move

Factor = Tensor | tuple[Tensor, Tensor]
"""A matrix (m, n), or two of rank r whose product it is: (m, r) and (r, n)."""


@dataclass(frozen=True, eq=False)
class LoHa:
    """The elementwise product of two low-rank matrices: delta = scale * (a1 @ b1) * (a2 @ b2).

    FedPara (arXiv 2108.06098), as in LyCORIS (arXiv 2309.14859). a1, a2: (O, r), b1, b2: (r, I).
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float = 1.0
    algebra = "LoHa"
    reads = False

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.a1), self.b1.shape[1]

    @property
    def rank(self) -> int:
        return len(self.b1)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.scale * (self.a1 @ self.b1) * (self.a2 @ self.b2)

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        return BoundFull(to(self.delta()))


@dataclass(frozen=True, eq=False)
class LoKr:
    """The Kronecker product of two matrices: delta = scale * kron(w1, w2). w1: (a, b), w2: (c, d); O = ac, I = bd.

    LyCORIS (arXiv 2309.14859). In its files scale is alpha / r if a factor is low-rank, and 1 if both are full.
    """

    w1: Factor
    w2: Factor
    scale: float = 1.0
    algebra = "LoKr"
    reads = False

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = size_of(self.w1), size_of(self.w2)
        return a * c, b * d

    @property
    def rank(self) -> int | None:
        low = [factor for factor in (self.w2, self.w1) if not isinstance(factor, Tensor)]
        return len(low[0][1]) if low else None

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.scale * torch.kron(product(self.w1), product(self.w2))

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        w2 = (to(self.w2),) if isinstance(self.w2, Tensor) else (to(self.w2[1]), to(self.w2[0]))
        return BoundLoKr(to(product(self.w1)), w2, self.scale)


@dataclass(frozen=True, eq=False)
class BoundLoKr:
    """A Kronecker product on a device, which is never built: kron(w1, w2) @ x is w1 @ X @ w2.T, where X is x as (b, d).

    w1: (a, b). w2: the matrices that are applied in turn to the last axis: (c, d), or (r, d) and (c, r).
    """

    w1: Tensor
    w2: tuple[Tensor, ...]
    scale: float

    @property
    def bytes(self) -> int:
        return self.w1.nbytes + sum(matrix.nbytes for matrix in self.w2)

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        y = x.reshape(len(x), self.w1.shape[1], -1)  # (N, b, d)
        for matrix in self.w2:
            y = y @ matrix.T
        out.add_((self.w1 @ y).reshape(len(x), -1), alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class GLoRA:
    """delta(W) = scale * (W @ a1 @ a2 + b1 @ b2). a1: (I, r), a2, b2: (r, I), b1: (O, r).

    arXiv 2306.07967, in the form of LyCORIS.
    """

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    scale: float = 1.0
    algebra = "GLoRA"
    reads = True

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b1), self.b2.shape[1]

    @property
    def rank(self) -> int:
        return len(self.b2)

    def delta(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return self.scale * (weight @ self.a1 @ self.a2 + self.b1 @ self.b2)

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        assert weight is not None
        up = torch.cat((weight @ self.a1, self.b1), 1)  # (O, 2r)
        return BoundLowRank(to(torch.cat((self.a2, self.b2))), to(up), self.scale)


@dataclass(frozen=True, eq=False)
class Dora:
    """DoRA: W + change is scaled to given norms of its rows, or of its columns (arXiv 2402.09353).

    change: does not read the weight. magnitude: (O, 1), the norms of the rows, or (1, I), those of the columns. The
    gradient does not pass through the norm (section 4.3).
    """

    change: Change
    magnitude: Tensor
    reads = True

    @property
    def algebra(self) -> str:
        return f"DoRA of {self.change.algebra}" if self.change.algebra != "LoRA" else "DoRA"

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape

    @property
    def rank(self) -> int | None:
        return self.change.rank

    @property
    def axis(self) -> Literal[0, 1]:
        """The axis along which norms are taken: 1 for those of rows."""
        return 1 if self.magnitude.shape == (self.shape[0], 1) else 0

    def delta(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        changed = weight + self.change.delta(None)
        return self._gain(changed) * changed - weight

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        assert weight is not None
        if self.axis == 0:
            return BoundFull(to(self.delta(weight)))
        gain = self._gain(weight + self.change.delta(None))[:, 0]
        return BoundDora(self.change.bind(None, None, to), to(gain), to(gain - 1), None if bias is None else to(bias))

    def _gain(self, changed: Tensor) -> Tensor:
        norm = changed.detach().norm(dim=self.axis, keepdim=True)
        return self.magnitude / (norm + torch.finfo(norm.dtype).eps)


@dataclass(frozen=True, eq=False)
class BoundDora:
    """DoRA of rows on a device: gain * change(x) + (gain - 1) * W @ x. The last product is `plain` without the bias."""

    change: Bound
    gain: Tensor  # (O,), magnitude / norm
    more: Tensor  # (O,), gain - 1
    bias: Tensor | None  # (O,)

    @property
    def bytes(self) -> int:
        return self.change.bytes + self.gain.nbytes + self.more.nbytes

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        change = torch.zeros_like(out)
        self.change.add(x, plain, change, 1.0)
        if self.bias is None and self.more.requires_grad:
            plain = plain.clone()  # the gradient needs what `out` may overwrite
        own = plain if self.bias is None else plain - self.bias
        out.add_(self.gain * change + self.more * own, alpha=strength)


@dataclass(frozen=True, eq=False)
class IA3:
    """Rows or columns of the weight are scaled: delta(W) = gain * W (arXiv 2205.05638).

    gain: (O, 1) for rows, (1, I) for columns; 0 changes nothing. The bias stays.
    """

    gain: Tensor
    size: tuple[int, int]  # (O, I)
    algebra = "IA3"
    rank = None
    reads = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def on_input(self) -> bool:
        return self.gain.shape != (self.size[0], 1)

    def delta(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return self.gain * weight

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        if self.on_input:
            return BoundFull(to(self.delta(weight)))
        return BoundIA3(to(self.gain[:, 0]), None if bias is None else to(bias))


@dataclass(frozen=True, eq=False)
class BoundIA3:
    """Scaled rows on a device."""

    gain: Tensor  # (O,)
    bias: Tensor | None  # (O,)

    @property
    def bytes(self) -> int:
        return self.gain.nbytes

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        own = plain if self.bias is None else plain - self.bias
        out.add_(self.gain * own, alpha=strength)


def product(factor: Factor) -> Tensor:
    """The matrix that a factor is."""
    return factor if isinstance(factor, Tensor) else factor[0] @ factor[1]


def size_of(factor: Factor) -> tuple[int, int]:
    """The size of the matrix that a factor is."""
    rows, columns = factor.shape if isinstance(factor, Tensor) else (len(factor[0]), factor[1].shape[1])
    return rows, columns
