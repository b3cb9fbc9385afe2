"""What one picture remembers of its blocks between steps, so that not every step runs them all."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

POINTS = {"first-block": 1, "taylor": 2}
"""How many times each kind of cache foretells from."""
in_use: ContextVar[StepCache | None] = ContextVar("in_use", default=None)
"""The cache of the picture that the forward under way is for."""


class Memory:
    """What a stack's blocks added, up to number `until`, at the last times they were run, the newest last."""

    def __init__(self, points: int):
        self.until = 0
        self._added: deque[tuple[float, Tensor]] = deque(maxlen=points)

    def keep(self, t: float, added: Tensor, until: int) -> None:
        self.until = until
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
        self.skips = False  # in the forward under way
        self.t = 0.0
        self._reference: Tensor | None = None  # what the first block added when all were last run
        self._stacks: list[Memory] = []
        self._entered = 0
        self._prompts = 0

    @contextmanager
    def step(self, t: float, prompts: int = 1) -> Iterator[None]:
        """Inside, one forward is run, at time t, under so many prompts.

        Where these are others than before, as guidance begins or ends, nothing is taken over; nor where a forward
        failed, since what is remembered is no longer of one.
        """
        if prompts != self._prompts:
            self.forget()
        self.t, self.skips, self._entered, self._prompts = t, False, 0, prompts
        token = in_use.set(self)
        try:
            yield
        except BaseException:
            self.forget()
            raise
        finally:
            in_use.reset(token)

    @property
    def undecided(self) -> bool:
        """Whether the forward has run no block yet."""
        return self._entered == 0

    def next_stack(self) -> Memory:
        """The memory of the stack that the forward comes to."""
        if self._entered == len(self._stacks):
            self._stacks.append(Memory(self.points))
        self._entered += 1
        return self._stacks[self._entered - 1]

    def decide(self, added: Tensor) -> None:
        """Whether this forward skips, from what its first block added."""
        if self._reference is not None:
            change = (added - self._reference).abs().mean() / self._reference.abs().mean()
            self.skips = change.item() < self.threshold
        if not self.skips:
            self._reference = added

    def forget(self) -> None:
        """Run all blocks the next time."""
        self._reference, self._stacks = None, []


def lagrange(times: Sequence[float], t: float) -> list[float]:
    """Weights of values at these times, all different, whose sum is the value at t of the polynomial through them."""
    return [math.prod((t - b) / (a - b) for b in times if b != a) for a in times]
