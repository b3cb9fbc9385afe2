"""The order of the queue: by priority, then fair sharing between keys, weighted by the work of their jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Waiting(NamedTuple):
    """A waiting job. cost: estimated seconds; place: its order among the jobs of its key."""

    id: str
    key: str
    priority: int
    place: float
    model: str
    cost: float


def in_order(
    waiting: Iterable[Waiting], clocks: Mapping[str, float], model: str | None = None, switch: float = 0.0
) -> list[Waiting]:
    """The jobs in the order in which they start.

    clocks: key -> seconds of work it has received. The key with the least work is next (start-time fair queueing, Goyal
    1996); jobs of one key keep their order. model: the loaded model. A job for another model counts `switch` seconds
    more, so that keys with two models do not make the engine load a model for each picture.
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
