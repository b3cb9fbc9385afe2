"""The order of the queue: by priority, then by turns between keys, weighed by the work they ask for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Waiting(NamedTuple):
    """A job that waits. cost: seconds it is thought to take; place: its order among the jobs of its key."""

    id: str
    key: str
    priority: int
    place: float
    model: str
    cost: float


def in_order(
    waiting: Iterable[Waiting], clocks: Mapping[str, float], model: str | None = None, switch: float = 0.0
) -> list[Waiting]:
    """The jobs in the order they will be begun.

    clocks: key -> seconds of work it has been given; the key that has had least is next (start-time fair queueing,
    Goyal 1996), and its own jobs keep their order. A job for another model than the one that is loaded counts `switch`
    seconds more, so that keys who use two models do not make the engine load one for every picture.
    """
    levels: dict[int, dict[str, deque[Waiting]]] = {}
    for job in sorted(waiting, key=lambda job: job.place):
        levels.setdefault(job.priority, {}).setdefault(job.key, deque()).append(job)
    clock = dict(clocks)
    order: list[Waiting] = []
    for level in sorted(levels, reverse=True):
        lanes = levels[level]
        while lanes:
            loaded = model

            def due(key: str, lanes: dict[str, deque[Waiting]] = lanes, loaded: str | None = loaded) -> tuple:
                job = lanes[key][0]
                return clock.get(key, 0.0) + (switch if loaded not in (None, job.model) else 0.0), job.place

            key = min(lanes, key=due)
            job = lanes[key].popleft()
            if not lanes[key]:
                del lanes[key]
            clock[key] = clock.get(key, 0.0) + job.cost
            model = job.model
            order.append(job)
    return order
