"""Draws the pictures of a bake-off, one at a time, and measures each. What is there is not drawn again."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from inkstream.clients.manifest import Manifest, Wanted
from inkstream.clients.many import encode_done
from inkstream.evaluate.bakeoff.meters import Meter
from inkstream.evaluate.bakeoff.plan import Entry, Plan
from inkstream.types import Done, Drawer, Event, Failed, Loading, Step

PICTURES = "pictures"
Failure = Literal["nan", "refusal", "error"]
FINAL: tuple[Failure, ...] = ("nan", "refusal")
"""Failures that are results: the picture would fail again, and is not tried again."""
GIVEN_UP = 3
"""A model is given up for this run after so many errors one after the other, because its server may be down."""

Open = Callable[[Entry], Drawer]
"""Opens the Drawer of a model."""
Told = tuple[Wanted, Loading | Step | Done | Failed]


def draw(
    plan: Plan, manifest: Manifest, todo: Sequence[Sequence[Wanted]], open_drawer: Open
) -> Generator[Told, None, None]:
    """Draw missing pictures, model by model. todo: of each model. Yields events, after a picture is on the disk.

    A picture's time is from its request to its end. The first one of a model in a run is cold: it has the loading.
    Closing the iterator stops within one step.
    """
    for entry, facts, jobs in zip(plan.entries, plan.facts, todo):
        if not jobs:
            continue
        drawer, meter, errors = open_drawer(entry), Meter(facts["device"]), 0
        for number, job in enumerate(jobs):
            for event in _draw_one(drawer, meter, job, number == 0, manifest):
                if isinstance(event, Done | Failed):
                    failed = isinstance(event, Failed) and failure_of(event.error) == "error"
                    errors = errors + 1 if failed else 0
                yield job, event
            if errors == GIVEN_UP:
                left = len(jobs) - number - 1
                yield (
                    job,
                    Loading("", note=f"{entry.name} failed {errors} times in a row: {left} pictures are left out"),
                )
                break


def _draw_one(
    drawer: Drawer, meter: Meter, job: Wanted, cold: bool, manifest: Manifest
) -> Iterator[Loading | Step | Done | Failed]:
    meter.start()
    began = time.perf_counter()
    events: Iterator[Event] = drawer.submit(job.request)
    with closing(events):  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Loading | Step):
                yield event
            elif isinstance(event, Done):
                seconds, used = time.perf_counter() - began, meter.stop()
                ran = drawer.ran_on(job.request.model)
                facts: dict[str, Any] = {
                    "cold": cold, "peak_bytes": used.peak_bytes, "joules": used.joules, "cost": event.cost,
                    "device": ran.get("device"), "width": event.image.width, "height": event.image.height,
                    "told": event.told,
                }  # fmt: skip
                manifest.add(job, encode_done(drawer, event, job.request), seconds, event.request.seed, facts)
                yield event
                return
            elif isinstance(event, Failed):
                kind = failure_of(event.error)
                manifest.fail(job, event.error, {"failure": kind, "final": kind in FINAL})
                yield event
                return


def failure_of(error: str) -> Failure:
    """The kind of a failure: numbers that are not finite, content that a provider refuses, or any other error."""
    if "not finite" in error:
        return "nan"
    return "refusal" if "refuses the content" in error else "error"


def open_manifest(folder: Path) -> Manifest:
    """The manifest of a bake-off's pictures. Raises InputError if another process draws into the folder."""
    return Manifest(folder / PICTURES)
