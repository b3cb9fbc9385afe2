"""Many requests at once through one Drawer. Several threads submit, so that pictures share forwards."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from inkstream.engine.drawing.writing import cost_of, wording
from inkstream.engine.pictures.metadata import encode_picture
from inkstream.types import SAVING, Done, Drawer, Event, Failed, Loading, Request, Saving, Step

PATIENCE = 10.0
"""Seconds to wait for the threads to stop after the iterator was closed."""


@dataclass(frozen=True)
class Drawn:
    """A finished picture as the bytes of a PNG that carries its request."""

    data: bytes
    seconds: float
    seed: int | None  # of the kept picture


Told = tuple[int, Loading | Step | Drawn | Failed]
"""The index of a request, and an event of it."""


def draw_many(
    drawer: Drawer,
    requests: Sequence[Request],
    slots: int,
    saving: Saving = SAVING,
) -> Iterator[Told]:
    """Yield the events of requests of one picture each. Each request ends with one Drawn or Failed.

    All requests of one model are drawn before the next model is loaded, `slots` of them at once. Closing the iterator
    stops within one step.
    """
    models = dict.fromkeys(request.model for request in requests)
    for model in models:
        places = [place for place, request in enumerate(requests) if request.model == model]
        yield from _draw_group(drawer, requests, places, slots, saving)


def _draw_group(
    drawer: Drawer,
    requests: Sequence[Request],
    places: Sequence[int],
    slots: int,
    saving: Saving,
) -> Iterator[Told]:
    """`draw_many` for requests of one model."""
    told: queue.SimpleQueue[Told] = queue.SimpleQueue()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    stop = threading.Event()
    for place in places:
        todo.put(place)

    def work() -> None:
        while not stop.is_set():
            try:
                place = todo.get_nowait()
            except queue.Empty:
                return
            for event in _draw(drawer, requests[place], stop, saving):
                told.put((place, event))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(slots, len(places)))]
    for thread in threads:
        thread.start()
    left = len(places)
    try:
        while left:
            place, event = told.get()
            left -= isinstance(event, Drawn | Failed)
            yield place, event
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


def _draw(
    drawer: Drawer, request: Request, stop: threading.Event, saving: Saving
) -> Iterator[Loading | Step | Drawn | Failed]:
    """Yield the events of one request, until `stop` is set."""
    events: Iterator[Event] = drawer.submit(request)
    try:
        for event in events:
            if stop.is_set():
                return
            if isinstance(event, Done):
                yield Drawn(encode_done(drawer, event, request, saving), event.seconds, event.request.seed)
                return
            if isinstance(event, Loading | Step | Failed):
                yield event
    except Exception as error:  # only this request fails; the others go on
        yield Failed(f"{type(error).__name__}: {error}")
    finally:
        events.close()  # type: ignore[attr-defined]


def encode_done(drawer: Drawer, done: Done, request: Request, saving: Saving = SAVING) -> bytes:
    """The bytes of a PNG of a finished picture, with its request and what drew it. request: as it was submitted."""
    spec = drawer.spec(done.request.model)
    extra = drawer.ran_on(done.request.model) | wording(request.prompt, done) | cost_of(done)
    return encode_picture(done.image, "PNG", done.request, spec, saving=saving, extra=extra)
