"""Orthogonal fine-tuning: the outputs or the inputs of a layer are rotated in small blocks, in one stage or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inkstream.weights.lora.changes import Bound, BoundFull, Move


class Stage(NamedTuple):
    """A rotation R of vectors of D = n * b numbers: they are reordered, rotated in n blocks, and put back in order."""

    turn: Tensor  # (n, b, b), the blocks of R minus the identity
    order: Tensor | None  # (D,) indices, or None


@dataclass(frozen=True, eq=False)
class OutputRotation:
    """OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243) of a layer's outputs, as LyCORIS has them: W becomes R @ W.

    blocks: (n, b, b), or (m, n, b, b) for m stages in a butterfly; their skew part Q makes rotations by the Cayley
    transform (I + Q)(I - Q)^-1. OFT takes its transpose. limit: the largest norm of all Q together; 0 is no limit.
    rescale: (O, 1), factors of the rotated rows, or None.
    """

    blocks: Tensor
    size: tuple[int, int]  # (O, I)
    limit: float = 0.0
    rescale: Tensor | None = None
    rank = None
    reads = True

    @property
    def algebra(self) -> str:
        return "OFT" if self.blocks.ndim == 3 else "BOFT"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def skew(self) -> Tensor:
        """Q, within the limit. Shaped like the blocks."""
        q = self.blocks - self.blocks.mT
        norm = q.norm()
        return q * (self.limit / norm) if 0 < self.limit < norm else q

    @property
    def stages(self) -> list[Stage]:
        turns = cayley(self.skew)
        if self.blocks.ndim == 3:
            return [Stage(turns.mT, None)]
        half = self.blocks.shape[-1] // 2
        rows = torch.arange(self.size[0], device=turns.device)
        return [Stage(turn, rows.view(-1, 2, half << i).mT.flatten()) for i, turn in enumerate(turns)]

    def delta(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        rotated = turned(self.stages, weight.T).T
        return rotated if self.rescale is None else self.rescale * rotated + (self.rescale - 1) * weight

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        stages = []
        for turn, order in self.stages:
            moved = to(turn)
            stages.append(Stage(moved, None if order is None else order.to(moved.device)))
        gain = None if self.rescale is None else self.rescale[:, 0]
        return BoundRotation(
            stages, *((None, None) if gain is None else (to(gain), to(gain - 1))), None if bias is None else to(bias)
        )


@dataclass(frozen=True, eq=False)
class BoundRotation:
    """Rotated outputs on a device."""

    stages: Sequence[Stage]
    gain: Tensor | None  # (O,), the factors of the rotated outputs
    more: Tensor | None  # (O,), gain - 1
    bias: Tensor | None  # (O,)

    @property
    def bytes(self) -> int:
        orders = sum(order.nbytes for _, order in self.stages if order is not None)
        return orders + sum(turn.nbytes for turn, _ in self.stages)

    def add(self, x: Tensor, plain: Tensor, out: Tensor, strength: float) -> None:
        own = plain if self.bias is None else plain - self.bias
        change = turned(self.stages, own)
        if self.gain is not None and self.more is not None:
            change = self.gain * change + self.more * own
        out.add_(change, alpha=strength)


@dataclass(frozen=True, eq=False)
class InputRotation:
    """OFT and BOFT of a layer's inputs, as PEFT has them: W becomes rescale * W @ R.T.

    stages: of R. rescale: (O, 1), or None.
    """

    stages: Sequence[Stage]
    size: tuple[int, int]  # (O, I)
    rescale: Tensor | None = None
    rank = None
    reads = True

    @property
    def algebra(self) -> str:
        return "OFT of inputs" if self.rescale is None else "BOFT of inputs"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def delta(self, weight: Tensor | None) -> Tensor:
        assert weight is not None
        rotated = turned(self.stages, weight)
        return rotated if self.rescale is None else self.rescale * rotated + (self.rescale - 1) * weight

    def bind(self, weight: Tensor | None, bias: Tensor | None, to: Move) -> Bound:
        return BoundFull(to(self.delta(weight)))


def turned(stages: Sequence[Stage], x: Tensor) -> Tensor:
    """R @ x - x for each vector of x, where R is the product of the stages. x: (..., D)"""
    change = torch.zeros_like(x)
    for turn, order in stages:
        y = x + change
        y = y if order is None else y[..., order]
        y = torch.einsum("kij,...kj->...ki", turn, y.unflatten(-1, turn.shape[:2])).flatten(-2)
        change = change + (y if order is None else y[..., order.argsort()])
    return change


def cayley(q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 - I, which is 2 Q (I - Q)^-1. q: (..., b, b), skew"""
    identity = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    return torch.linalg.solve(identity - q, 2 * q, left=False)


def peft_oft(values: Tensor, inputs: int, terms: int | None, eps: float | None) -> list[Stage]:
    """The rotation of PEFT's `oft_R`. values: (n, b(b-1)/2), the upper triangles of skew matrices Q.

    One row stands for all blocks if there is one. terms: of the Neumann series of the Cayley transform; None: the exact
    transform, which PEFT takes of -Q. eps: the limit of constrained OFT for all norms of Q, or None. Raises ValueError
    if the values do not make blocks of `inputs` numbers.
    """
    size = round((1 + (1 + 8 * values.shape[1]) ** 0.5) / 2)
    count = inputs // size
    if size * (size - 1) // 2 != values.shape[1] or count * size != inputs or len(values) not in (1, count):
        raise ValueError(f"{tuple(values.shape)} does not make rotations of {inputs} inputs")
    rows, columns = torch.triu_indices(size, size, 1)
    q = values.new_zeros(len(values), size, size)
    q[:, rows, columns] = values
    q = q - q.mT
    if eps is not None:
        norms = q.norm(dim=(1, 2), keepdim=True)
        most = eps / len(values) ** 0.5
        q = torch.where(norms <= most, q, q * (most / norms))
    if terms is None:
        turn = cayley(-q)
    else:  # 2Q + 2Q^2 + ... + Q^last, as PEFT sums it
        last = 1 if terms == 2 else max(terms - 1, 3)
        turn, power = torch.zeros_like(q), q
        for i in range(1, last + 1 if terms > 1 else 1):
            turn = turn + (1 if i == last > 1 else 2) * power
            power = power @ q
    return [Stage(turn.expand(count, -1, -1), None)]


def peft_boft(values: Tensor) -> list[Stage]:
    """The rotation of PEFT's `boft_R`. values: (m, n, b, b), whose skew part is minus the Q of the Cayley transform."""
    stages, size = [], values.shape[1] * values.shape[2]
    half = values.shape[-1] // 2
    for i, turn in enumerate(cayley((values.mT - values) / 2)):
        order = torch.arange(size).view(-1, 1 << i, 2, half).transpose(1, 2).flatten().argsort() if i else None
        stages.append(Stage(turn, order))
    return stages
