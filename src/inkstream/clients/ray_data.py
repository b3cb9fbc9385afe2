"""Many requests over Ray Data: several engines, each an actor, on this machine or on a cluster's.

What is drawn comes back as bytes, so that only the process that asked writes files; pictures that a request names go
along with it. A model given as a path must be there on every machine.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from inkstream.clients.many import Drawn, Told, draw_many
from inkstream.engine.pictures.inputs import read_source
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.types import Failed, InputError, Request

if TYPE_CHECKING:
    from inkstream.engine.engine import Engine

STORE = 200 << 20
"""Bytes of shared memory that Ray takes here, where it is started for this alone; pictures pass through it."""
TRIES = 3
"""How often a group of requests is tried whose engine dies over it."""


class Drawer:
    """An actor: an engine, and the requests that it is handed, a group at once."""

    def __init__(self, make: Callable[[], Engine], metadata: Literal["full", "minimal", "none"]):
        self.engine = make()
        self.metadata: Literal["full", "minimal", "none"] = metadata

    def __call__(self, group: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Columns `place` and `request` -> `place`, `data` (a PNG, or nothing), `seconds` and `error`."""
        requests = [Request.model_validate_json(text) for text in group["request"]]
        told: dict[str, list[Any]] = {"place": [], "data": [], "seconds": [], "error": []}
        for place, event in draw_many(self.engine, requests, len(requests), self.metadata):
            if isinstance(event, Drawn | Failed):
                drawn = event if isinstance(event, Drawn) else Drawn(b"", 0.0)
                error = event.error if isinstance(event, Failed) else ""
                row = (int(group["place"][place]), drawn.data, drawn.seconds, error)
                for name, value in zip(told, row):
                    told[name].append(value)
        return told


def draw_on_ray(
    requests: Sequence[Request],
    make: Callable[[], Engine],
    slots: int,
    engines: int | None = None,
    metadata: Literal["full", "minimal", "none"] = "full",
) -> Iterator[Told]:
    """What becomes of requests of one picture each: each is once Drawn or Failed, as groups of `slots` are done.

    make: makes an engine, on whatever machine. engines: how many; None: one for each GPU, or one. It is drawn on the
    cluster that RAY_ADDRESS names, else on one that is started here and ends with it. InputError without Ray.
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
            raise InputError(f"no Ray answers at RAY_ADDRESS {address}: start it, or unset RAY_ADDRESS") from None
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
        context.max_errored_blocks = -1  # a group whose engine dies over it is left out, and told below
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # such a death is told below, in a line
        order = sorted(range(len(requests)), key=lambda place: requests[place].model)  # an engine loads each model once
        groups = [order[start : start + slots] for start in range(0, len(order), slots)]
        tables = [
            pyarrow.table({"place": group, "request": [_carried(requests[place]) for place in group]})
            for group in groups
        ]
        warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")  # nothing else says how often to try
        drawn = ray.data.from_arrow(tables).map_batches(
            Drawer,
            batch_size=None,
            fn_constructor_args=(make, metadata),
            concurrency=count,
            num_gpus=min(1.0, gpus / count) if gpus else None,
            num_cpus=1 if gpus else max(1, cores),
            ray_remote_args_fn=lambda: {"max_task_retries": TRIES - 1},
        )
        left = set(order)
        for group in drawn.iter_batches(batch_size=None, prefetch_batches=0):
            for place, data, seconds, error in zip(*(group[name] for name in ("place", "data", "seconds", "error"))):
                left.discard(int(place))
                yield int(place), Failed(str(error)) if error else Drawn(bytes(data), float(seconds))
        for place in sorted(left):
            yield place, Failed(f"the engine died over it or over one drawn with it, {TRIES} times")
    finally:
        ray.shutdown()


def _carried(request: Request) -> str:
    """The request as JSON, with the pictures it names in it."""
    fields = request.model_dump(exclude_unset=True)
    for name in PICTURE_FIELDS:
        given = fields.get(name)
        if isinstance(given, str):
            fields[name] = read_source(given)
        elif given:
            fields[name] = [read_source(one) for one in given]
    return Request.model_validate(fields).model_dump_json(exclude_unset=True)
