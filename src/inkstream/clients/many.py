"""Many requests at once through one engine or server: so many threads submit, so their pictures share forwards."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from inkstream.clients.http import Client
from inkstream.engine.drawing.writing import wording
from inkstream.engine.pictures.metadata import encode_picture
from inkstream.types import Done, Event, Failed, Loading, Request, Spec, Step

if TYPE_CHECKING:
    from inkstream.engine.engine import Engine

PATIENCE = 10.0
"""Seconds that those who draw are given to stop, when nobody wants their pictures any more."""


@dataclass(frozen=True)
class Drawn:
    """A finished picture as the bytes of a PNG that carries its request."""

    data: bytes
    seconds: float


Told = tuple[int, Loading | Step | Drawn | Failed]
"""Which request, by its place among them, and what became of it."""


def draw_many(
    engine: Engine | Client,
    requests: Sequence[Request],
    slots: int,
    metadata: Literal["full", "minimal", "none"] = "full",
) -> Iterator[Told]:
    """What happens to requests of one picture each, as it happens; for each once Drawn or Failed.

    Models take turns: all requests of one are drawn before the next is loaded, `slots` of them at once. Closing the
    iterator stops within one step.
    """
    models = dict.fromkeys(request.model for request in requests)
    for model in models:
        places = [place for place, request in enumerate(requests) if request.model == model]
        yield from _draw_group(engine, requests, places, slots, metadata)


def about(engine: Engine | Client, name: str) -> tuple[Spec, dict[str, str]]:
    """The model that draws, and on what it runs, where that is known here."""
    if isinstance(engine, Client):
        return engine.spec(name), {}
    model = engine.model
    return model.spec, {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def _draw_group(
    engine: Engine | Client,
    requests: Sequence[Request],
    places: Sequence[int],
    slots: int,
    metadata: Literal["full", "minimal", "none"],
) -> Iterator[Told]:
    """The same of requests of one model."""
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
            for event in _draw(engine, requests[place], stop, metadata):
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
    engine: Engine | Client, request: Request, stop: threading.Event, metadata: Literal["full", "minimal", "none"]
) -> Iterator[Loading | Step | Drawn | Failed]:
    """What happens to one request; after `stop` nothing more."""
    events: Iterator[Event] = engine.submit(request)
    try:
        for event in events:
            if stop.is_set():
                return
            if isinstance(event, Done):
                yield Drawn(_encode(engine, event, request, metadata), event.seconds)
                return
            if isinstance(event, Loading | Step | Failed):
                yield event
    except Exception as error:  # of this request; the others go on
        yield Failed(f"{type(error).__name__}: {error}")
    finally:
        events.close()  # type: ignore[attr-defined]


def _encode(
    engine: Engine | Client, done: Done, request: Request, metadata: Literal["full", "minimal", "none"]
) -> bytes:
    spec, ran = about(engine, done.request.model)
    extra = ran | wording(request.prompt, done.request, spec)
    return encode_picture(done.image, "PNG", done.request, spec, metadata=metadata, extra=extra)
