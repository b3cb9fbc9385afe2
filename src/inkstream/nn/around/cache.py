"""What one picture remembers of its blocks between steps, so that not every step runs them all."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

POINTS = {"first-block": 1, "taylor": 2}
"""How many times each kind of cache foretells from."""


class Memory:
    """What a stack's blocks added to a picture's rows at the last times that they were run, the newest last."""

    def __init__(self, points: int):
        self._added: deque[tuple[float, Tensor]] = deque(maxlen=points)

    def keep(self, t: float, added: Tensor) -> None:
        others = [(s, tensor) for s, tensor in self._added if s != t]  # a solver may ask twice at one time
        self._added.clear()
        self._added.extend([*others, (t, added)])

    def foretell(self, t: float) -> Tensor:
        """What they would add at time t: the polynomial through what is remembered."""
        weights = lagrange([s for s, _ in self._added], t)
        first, *rest = (weight * added for weight, (_, added) in zip(weights, self._added))
        return sum(rest, first)


class StepCache:
    """Of one picture, from its first step to its last.

    The first block of a forward is always run. Where what it adds has changed by less than the share `threshold` since
    the blocks behind it were last run, they are left out, and what they would add is foretold from what they added at
    the last `points` times: with one, it is what it was (the first-block cache); with more, a polynomial in time
    through them (TaylorSeer, arXiv 2503.06923, on times that need not be evenly spaced). All stacks that a forward runs
    follow its first one; prompts that guidance asks together are decided on together.
    """

    def __init__(self, points: int, threshold: float):
        self.points = points
        self.threshold = threshold
        self.skips: bool | None = None  # in the forward under way; None: its first block is not run yet
        self._t = 0.0
        self._reference: Tensor | None = None  # what the first block added when all were last run
        self._stacks: dict[str, Memory] = {}
        self._prompts = 0

    def begin(self, t: float, prompts: int) -> None:
        """A forward begins, at time t, under so many prompts of the picture.

        Where these are others than before, as guidance begins or ends, nothing is taken over.
        """
        if prompts != self._prompts:
            self.forget()
        self._t, self._prompts, self.skips = t, prompts, None

    def change(self, added: Tensor) -> Tensor:
        """How much of what the first block adds is not as it was, as a share of it; without end where nothing is
        remembered. One number, on the device."""
        if self._reference is None:
            return torch.full((), math.inf, device=added.device)
        return ((added - self._reference).abs().mean() / self._reference.abs().mean()).float()

    def decide(self, change: float, added: Tensor) -> None:
        """Whether this forward skips, by how much of what its first block added has changed."""
        self.skips = change < self.threshold
        if not self.skips:
            self._reference = added

    def keep(self, stack: str, added: Tensor) -> None:
        """What the blocks of a stack added in this forward."""
        self._stacks.setdefault(stack, Memory(self.points)).keep(self._t, added)

    def foretell(self, stack: str) -> Tensor:
        """What they would add in this forward."""
        return self._stacks[stack].foretell(self._t)

    def forget(self) -> None:
        """Run all blocks the next time."""
        self._reference, self._stacks = None, {}


def lagrange(times: Sequence[float], t: float) -> list[float]:
    """Weights of values at these times, all different, whose sum is the value at t of the polynomial through them."""
    return [math.prod((t - b) / (a - b) for b in times if b != a) for a in times]
