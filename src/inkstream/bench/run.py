"""Measure the wall time of calls. Contenders take turns in one process, so the machine's load affects all equally."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter


@dataclass(frozen=True)
class Times:
    """Median, smallest and largest time of one contender, in seconds."""

    median: float
    least: float
    most: float


def take_turns(contenders: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> dict[str, Times]:
    """Time contenders in turn, A B A B, after a warm-up of all; returns times by name.

    A contender must have finished its work when it returns. On a GPU it must copy the result back to the host.
    """
    for _ in range(warmup):
        for call in contenders.values():
            call()
    rounds = [[_seconds(call) for call in contenders.values()] for _ in range(repeats)]
    return {name: _times(seconds) for name, seconds in zip(contenders, zip(*rounds))}


def _seconds(fn: Callable[[], object]) -> float:
    start = perf_counter()
    fn()
    return perf_counter() - start


def _times(seconds: Sequence[float]) -> Times:
    return Times(median(seconds), min(seconds), max(seconds))
