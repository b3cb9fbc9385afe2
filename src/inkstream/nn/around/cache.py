"""Step cache: keeps the block residuals of one picture between steps, so that some steps skip most blocks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

POINTS = {"first-block": 1, "taylor": 2}
"""How many past steps each kind of cache extrapolates from."""


class Memory:
    """The residuals that one stack of blocks added to a picture's rows the last times it ran, newest last."""

    def __init__(self, points: int):
        self._added: deque[tuple[float, Tensor]] = deque(maxlen=points)

    def keep(self, t: float, added: Tensor) -> None:
        others = [(s, tensor) for s, tensor in self._added if s != t]  # a solver may evaluate one time twice
        self._added.clear()
        self._added.extend([*others, (t, added)])

    def foretell(self, t: float) -> Tensor:
        """Predicts the residual at time t: the polynomial through the stored residuals."""
        weights = lagrange([s for s, _ in self._added], t)
        first, *rest = (weight * added for weight, (_, added) in zip(weights, self._added))
        return sum(rest, first)


class StepCache:
    """The step cache of one picture, from its first step to its last.

    The first block of a forward always runs. If its residual has changed by less than the fraction `threshold` since
    the other blocks last ran, the other blocks are skipped. Their residual is then extrapolated from the last `points`
    runs. One point repeats the last residual (first-block cache). More points take a polynomial in time through them
    (TaylorSeer, arXiv 2503.06923, here for unevenly spaced times). All stacks of a forward follow the decision of its
    first stack. The prompts of one guided picture share one decision.
    """

    def __init__(self, points: int, threshold: float):
        self.points = points
        self.threshold = threshold
        self.skips: bool | None = None  # decision for the current forward; None: its first block has not run yet
        self._t = 0.0
        self._reference: Tensor | None = None  # the first block's residual when all blocks last ran
        self._stacks: dict[str, Memory] = {}
        self._prompts = 0

    def begin(self, t: float, prompts: int) -> None:
        """Begins a forward at time t with this number of prompts of the picture.

        A different number of prompts than before (guidance begins or ends) clears the cache.
        """
        if prompts != self._prompts:
            self.forget()
        self._t, self._prompts, self.skips = t, prompts, None

    def change(self, added: Tensor) -> Tensor:
        """The relative change of the first block's residual, a scalar on the device; infinity if the cache is empty."""
        if self._reference is None:
            return torch.full((), math.inf, device=added.device)
        return ((added - self._reference).abs().mean() / self._reference.abs().mean()).float()

    def decide(self, change: float, added: Tensor) -> None:
        """Decides whether this forward skips blocks. change: from `change`; added: the first block's residual."""
        self.skips = change < self.threshold
        if not self.skips:
            self._reference = added

    def keep(self, stack: str, added: Tensor) -> None:
        """Stores the residual of a stack in this forward."""
        self._stacks.setdefault(stack, Memory(self.points)).keep(self._t, added)

    def foretell(self, stack: str) -> Tensor:
        """Predicts the residual of a stack in this forward."""
        return self._stacks[stack].foretell(self._t)

    def forget(self) -> None:
        """Clears the cache, so that all blocks run in the next forward."""
        self._reference, self._stacks = None, {}


def lagrange(times: Sequence[float], t: float) -> list[float]:
    """Lagrange weights: the sum of weights * values is the interpolating polynomial at t. times: all different."""
    return [math.prod((t - b) / (a - b) for b in times if b != a) for a in times]
