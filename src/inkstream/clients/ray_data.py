"""Many requests over Ray Data: several engines, each in an actor, on this machine or on a cluster.

Pictures come back as bytes, so only the calling process writes files. The input pictures of a request are sent along
with it. A model given as a path must be there on every machine.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inkstream.clients.many import Drawn, Told, draw_many
from inkstream.engine.pictures.inputs import read_source
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.types import SAVING, Failed, InputError, Request, Saving

if TYPE_CHECKING:
    from inkstream.engine.engine import Engine

STORE = 200 << 20
"""Bytes of shared memory for a Ray that is started here. Pictures pass through it."""
TRIES = 3
"""How often a group of requests is tried if its engine dies."""


class Actor:
    """An engine in a Ray actor. It draws groups of requests."""

    def __init__(self, make: Callable[[], Engine], saving: Saving):
        self.engine = make()
        self.saving = saving

    def __call__(self, group: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Columns `place` and `request` -> `place`, `data` (a PNG, or nothing), `seconds`, `seed` and `error`."""
        requests = [Request.model_validate_json(text) for text in group["request"]]
        told: dict[str, list[Any]] = {"place": [], "data": [], "seconds": [], "seed": [], "error": []}
        for place, event in draw_many(self.engine, requests, len(requests), self.saving):
            if isinstance(event, Drawn | Failed):
                drawn = event if isinstance(event, Drawn) else Drawn(b"", 0.0, requests[place].seed)
                error = event.error if isinstance(event, Failed) else ""
                row = (int(group["place"][place]), drawn.data, drawn.seconds, drawn.seed or 0, error)
                for name, value in zip(told, row):
                    told[name].append(value)
        return told


def draw_on_ray(
    requests: Sequence[Request],
    make: Callable[[], Engine],
    slots: int,
    engines: int | None = None,
    saving: Saving = SAVING,
) -> Iterator[Told]:
    """Yield one Drawn or Failed for each request. Each request has one picture. Groups of `slots` are drawn together.

    make: makes an engine, on any machine. engines: their number; None: one for each GPU, or one. RAY_ADDRESS names the
    cluster; without it, a cluster is started here and stopped at the end. Raises InputError if Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("Ray is not installed: pip install 'inkstream[ray]', or leave --ray out") from None
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError:
            raise InputError(f"Ray does not answer at RAY_ADDRESS {address}: start it, or unset RAY_ADDRESS") from None
    else:
        ray.init(
            "local",
            include_dashboard=False,
            object_store_memory=STORE,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus = int(sum(machine.get("GPU", 0) for machine in machines))
        count = engines or max(1, gpus)
        smallest = min((machine["CPU"] for machine in machines), default=1)
        cores = int(smallest) // math.ceil(count / max(1, len(machines)))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # left out: reported below
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # as above
        order = sorted(range(len(requests)), key=lambda place: requests[place].model)  # an engine loads each model once
        groups = [order[start : start + slots] for start in range(0, len(order), slots)]
        tables = [
            pyarrow.table({"place": group, "request": [_carried(requests[place]) for place in group]})
            for group in groups
        ]
        warnings.filterwarnings(
            "ignore", "`ray_remote_args_fn` is deprecated"
        )  # no other argument sets the number of tries
        groups = ray.data.from_arrow(tables).map_batches(
            Actor,
            batch_size=None,
            fn_constructor_args=(make, saving),
            concurrency=count,
            num_gpus=min(1.0, gpus / count) if gpus else None,
            num_cpus=1 if gpus else max(1, cores),
            ray_remote_args_fn=lambda: {"max_task_retries": TRIES - 1},
        )
        left = set(order)
        for group in groups.iter_batches(batch_size=None, prefetch_batches=0):
            names = ("place", "data", "seconds", "seed", "error")
            for place, data, seconds, seed, error in zip(*(group[name] for name in names)):
                left.discard(int(place))
                drawn = Drawn(bytes(data), float(seconds), int(seed))
                yield int(place), Failed(str(error)) if error else drawn
        for place in sorted(left):
            yield place, Failed(f"the engine died {TRIES} times while it drew this request, or one beside it")
    finally:
        ray.shutdown()


def _carried(request: Request) -> str:
    """Return the request as JSON, with the content of its input pictures."""
    fields = request.model_dump(exclude_unset=True)
    for name in PICTURE_FIELDS:
        given = fields.get(name)
        if isinstance(given, str):
            fields[name] = read_source(given)
        elif given:
            fields[name] = [read_source(one) for one in given]
    return Request.model_validate(fields).model_dump_json(exclude_unset=True)
